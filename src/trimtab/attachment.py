"""What was fitted for one base model: codebooks, channel orders, head scores. The base is never changed.

An attachment is a folder of two files: `attachment.safetensors` with the tensors, and `attachment.json`
with the kind (the method that made it), its options, the base model's fingerprint and shape, the data it was
fitted on and the effect that was measured. A method asks for one by kind and place (`Attachments.get`) and
for its tensors by name and shape (`Attachment.tensor`); what does not fit is a ConfigError, before any
request.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from trimtab.models.transformer import Model

FORMAT = 1
TENSORS, FACTS = "attachment.safetensors", "attachment.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an attachment was made for; the fingerprint decides, the rest is for people."""

    fingerprint: str
    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, model: Model) -> Base:
        c = model.config
        name = "a model without a folder" if model.path is None else model.path.name
        shape = (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size)
        return cls(model.fingerprint(), name, c.architecture, *shape)

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.architecture}, {self.num_layers} layers, {self.num_heads} heads on "
            f"{self.num_kv_heads} KV heads of {self.head_dim}, fingerprint {self.fingerprint[:12]})"
        )


@dataclass(frozen=True)
class Attachment:
    """Tensors fitted for one base model, and how they came about.

    Attributes:
        kind: the method that made it, which is also the name of its folder beside a model.
        options: that method's options.
        made: data name and sha256, sequences, tokens, seed, version of trimtab.
        measured: effects that were measured when it was made; may be empty.
        path: the folder it was loaded from, or None.
    """

    kind: str
    base: Base
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder: all of it, or nothing. Raises OutputError where it cannot be written.

        An existing folder is replaced only with `overwrite`, and only if it holds an attachment.
        """
        from trimtab.models.save import replace_folder

        folder = Path(folder).expanduser()
        if overwrite and folder.is_dir() and any(folder.iterdir()) and not (folder / FACTS).is_file():
            raise OutputError(f"{folder} is not an attachment, so it is not replaced; choose another folder")
        facts = {
            "format": FORMAT,
            "kind": self.kind,
            "options": dict(self.options),
            "base": dataclasses.asdict(self.base),
            "made": dict(self.made),
            "measured": dict(self.measured),
            "tensors": {name: [_name(t.dtype), *t.shape] for name, t in sorted(self.tensors.items())},
        }

        def fill(scratch: Path) -> None:
            save_file({n: t.detach().cpu().contiguous() for n, t in self.tensors.items()}, scratch / TENSORS)
            (scratch / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            (scratch / TENSORS).chmod(0o644)  # safetensors leaves it to its owner alone
            for name in (TENSORS, FACTS):
                with (scratch / name).open("rb") as written:
                    os.fsync(written.fileno())

        return replace_folder(folder, fill, what="the attachment", overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> Attachment:
        """Read an attachment. Raises ConfigError, naming the file, for anything missing or broken."""
        folder = Path(folder).expanduser()
        facts = _read_facts(folder / FACTS)
        try:
            tensors = load_file(folder / TENSORS)
        except (OSError, SafetensorError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            raise ConfigError(f"{folder / TENSORS} {reason}; make the attachment again") from None
        for name, described in facts["tensors"].items():
            found = tensors.get(name)
            if found is None or [_name(found.dtype), *found.shape] != described:
                has = "lacks it" if found is None else f"holds {[_name(found.dtype), *found.shape]}"
                raise ConfigError(
                    f"{folder / FACTS} lists the tensor {name!r} as {described}, but {TENSORS} {has}; "
                    "make the attachment again"
                )
        parts = {key: facts[key] for key in ("kind", "options", "made", "measured")}
        return cls(base=Base(**facts["base"]), tensors=tensors, path=folder, **parts)

    def check(self, model: Model) -> None:
        """Raise ConfigError if this was made for another model."""
        base = Base.of(model)
        if base.fingerprint != self.base.fingerprint:
            raise ConfigError(
                f"the attachment {self._name} was made for {self.base}, and this model is {base}; make one "
                f"for it: {command(self.kind, model)}"
            )

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor `name`, which must have this shape and dtype and hold finite numbers."""
        found = self.tensors.get(name)
        wanted = f"{_name(dtype)} {list(shape)}"
        if found is None:
            raise ConfigError(
                f"the attachment {self._name} has no tensor {name!r} ({wanted}); make the attachment again"
            )
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ConfigError(
                f"the tensor {name!r} of the attachment {self._name} is {_name(found.dtype)} "
                f"{list(found.shape)}, not {wanted}; make the attachment again"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise ConfigError(
                f"the tensor {name!r} of the attachment {self._name} holds values that are not numbers; "
                "make the attachment again"
            )
        return found

    @property
    def _name(self) -> str:
        return repr(self.kind if self.path is None else str(self.path))


class Attachments:
    """Finds what was fitted for `model`. Policies reach it as `shape.attachments`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def get(self, kind: str, where: str = "auto") -> Attachment:
        """The attachment of `kind` at `where`: a folder, or "auto" for `attachments/KIND` in the model's own.

        Raises ConfigError, with the command that makes one, if there is none, and if it is of another kind
        or of another model.
        """
        if where != "auto":
            folder = Path(where).expanduser()
        elif self.model.path is not None:
            folder = self.model.path / "attachments" / kind
        else:
            folder = None
        if folder is None or not folder.is_dir():
            sought = "this model has no folder to look in" if folder is None else f"{folder} is not there"
            raise ConfigError(
                f"{kind} needs an attachment and {sought}; make one: {command(kind, self.model, folder)}"
            )
        found = Attachment.load(folder)
        if found.kind != kind:
            raise ConfigError(f"{folder} is an attachment of kind {found.kind!r}, but {kind!r} is needed")
        found.check(self.model)
        return found


def command(kind: str, model: Model, folder: Path | None = None) -> str:
    """The command that makes an attachment of `kind` for `model`."""
    where = "MODEL" if model.path is None else shlex.quote(str(model.path))
    if folder is None and model.path is not None:
        folder = model.path / "attachments" / kind
    out = "DIR" if folder is None else shlex.quote(str(folder))
    return f"trimtab attach {kind} {where} --data FILE --out {out}"


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing, so {file.parent} is not an attachment") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); make the attachment again") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        version = facts.get("format") if isinstance(facts, dict) else None
        raise ConfigError(
            f"{file} is of format {version!r} and this trimtab reads {FORMAT}; make the attachment again"
        )
    mappings = ("options", "base", "made", "measured", "tensors")
    broken = [key for key in mappings if not isinstance(facts.get(key), dict)]
    if not isinstance(facts.get("kind"), str):
        broken.append("kind")
    elif not broken and set(facts["base"]) != {f.name for f in dataclasses.fields(Base)}:
        broken.append("base")
    if broken:
        raise ConfigError(f"{file} has no proper entry {broken[0]!r}; make the attachment again")
    return facts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
