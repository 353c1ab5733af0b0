"""Reading safetensors files: which tensors they hold, and the tensors themselves by memory map.

A tensor that needs no conversion stays a view of the mapped file: it costs no memory until it is read,
and the kernel may drop its pages again. A tensor that is converted is read through a mapping that is
closed soon after, so that source pages do not add up next to the converted weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trimtab.errors import CheckpointError
from trimtab.models.memory import WeightMemory

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_REOPEN_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, or the part `[expert, start:stop]` of one that stacks experts."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: tuple[int, int, int] | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        if self.part is None:
            return whole
        expert, start, stop = self.part
        return whole[expert, start:stop]


def list_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of the model folder by name; raises CheckpointError for a missing or broken file."""
    found: dict[str, Stored] = {}
    for file in _files(folder):
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                part = handle.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in DTYPES:
                    raise CheckpointError(
                        f"{file} stores {name!r} as {dtype}; trimtab reads {', '.join(DTYPES)}, so use an "
                        "unquantized version of the model"
                    )
                if name in found:
                    raise CheckpointError(f"both {found[name].file} and {file} hold the tensor {name!r}")
                found[name] = Stored(file, name, tuple(part.get_shape()), DTYPES[dtype])
    return found


def read_tensors(
    wanted: Mapping[str, Stored], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors of `wanted` under its keys, in `dtype` on `device`."""
    mapped = {k: s for k, s in wanted.items() if s.dtype == dtype and device.type == "cpu"}
    tensors: dict[str, torch.Tensor] = {}
    for file, group in _by_file(mapped).items():
        with _open(file) as handle:
            for key, stored in group:
                tensors[key] = stored.take(_get(handle, stored))
    # Largest first: the room for a source beside its copy is then needed while little else is held.
    copied = sorted(
        ((k, s) for k, s in wanted.items() if k not in mapped),
        key=lambda item: (-item[1].nbytes, item[1].file, item[0]),
    )
    memory = None
    if device.type == "cpu":
        memory = WeightMemory([torch.Size(s.shape).numel() * dtype.itemsize for _, s in copied])
    for group in _batches(copied):
        with _open(group[0][1].file) as handle:
            for key, stored in group:
                part = stored.take(_get(handle, stored))
                if memory is None:
                    tensors[key] = part.to(device=device, dtype=dtype, copy=True)
                else:
                    tensors[key] = memory.hold(part, dtype)
    return tensors


def same_values(first: Stored, second: Stored) -> bool:
    """Whether two stored tensors are equal, element by element."""
    with _open(first.file) as one, _open(second.file) as two:
        return torch.equal(_get(one, first), _get(two, second))


def _files(folder: Path) -> list[Path]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; {others[0]} is in a format that trimtab does not read" if others else ""
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}{hint}")
    try:
        names = sorted(map(Path, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}") from None
    for name in names:
        if name.parent != Path():
            raise CheckpointError(f"{index} names the shard {str(name)!r}; shards must lie beside the index")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the shard {name}, which {_INDEX} names")
    return [folder / name for name in names]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); fetch it again"
        ) from None


def _get(handle: Any, stored: Stored) -> torch.Tensor:
    return handle.get_tensor(stored.name)


def _by_file(wanted: Mapping[str, Stored]) -> dict[Path, list[tuple[str, Stored]]]:
    groups: dict[Path, list[tuple[str, Stored]]] = {}
    for key, stored in wanted.items():
        groups.setdefault(stored.file, []).append((key, stored))
    return groups


def _batches(ordered: Sequence[tuple[str, Stored]]) -> Iterator[list[tuple[str, Stored]]]:
    """Neighbours from one file, about `_REOPEN_BYTES` at a time."""
    batch: list[tuple[str, Stored]] = []
    size = 0
    for item in ordered:
        if batch and (item[1].file != batch[0][1].file or size >= _REOPEN_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[1].nbytes
    if batch:
        yield batch
