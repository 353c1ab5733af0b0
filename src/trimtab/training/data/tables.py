"""Rows of parquet and Arrow files, as Hugging Face datasets keep them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError
from trimtab.training.data.readers import Record

if TYPE_CHECKING:
    import pyarrow

_ROWS = 64  # a row may be a whole book


def iterate_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Record]:
    """The rows of a `.parquet` or `.arrow` file; only `columns` are read where the file has all of them.

    Raises ConfigError where pyarrow is missing or the file is damaged.
    """
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
    if path.exists() and not path.stat().st_size:
        return
    number = 0
    try:
        batches = _parquet(path, columns) if path.suffix == ".parquet" else _arrow(path, columns)
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield Record(values, path, number, "row")
    except (pyarrow.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is damaged after row {number} ({detail}); copy or download it again"
        ) from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = _wanted(columns, file.schema_arrow.names)
        yield from file.iter_batches(batch_size=_ROWS, columns=wanted)


def _arrow(path: Path, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        try:
            batches = iter(pyarrow.ipc.open_stream(mapped))
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            file = pyarrow.ipc.open_file(mapped)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        for batch in batches:
            wanted = _wanted(columns, batch.schema.names)
            chosen = batch if wanted is None else batch.select(wanted)
            for start in range(0, len(chosen), _ROWS):
                yield chosen.slice(start, _ROWS)


def _wanted(columns: Sequence[str], names: Sequence[str]) -> list[str] | None:
    return list(columns) if columns and set(columns) <= set(names) else None
