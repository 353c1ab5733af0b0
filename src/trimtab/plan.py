"""The plan: which model runs with which method behind each seam, and within which bounds.

A plan is a frozen value. The string `cache=kivi:bits=2 dtype=bfloat16`, the YAML file with the same
settings and the Python object `Plan(cache="kivi:bits=2", dtype="bfloat16")` are equal objects. Every
name, type and range is checked on construction; what depends on the model is checked by `check`, which
reports all that is wrong at once. Method modules (and torch with them) are imported only when a method
other than a ready-made `MethodChoice` is named.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError, PlanError, did_you_mean
from trimtab.registry import KV_CACHES, WEIGHTS, Registry
from trimtab.sizes import parse_bytes

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
BACKENDS = ("auto", "native", "torch")


@dataclass(frozen=True, slots=True)
class MethodChoice:
    """One seam's choice: a method's registered name, its typed options, and what it is combined with."""

    name: str
    options: Any
    then: tuple[MethodChoice, ...] = ()

    @classmethod
    def parse(
        cls, value: str | Mapping[str, Any] | Sequence[Any] | MethodChoice, registry: Registry
    ) -> MethodChoice:
        """From `"kivi:bits=2,group_size=32"`, `{"name": "kivi", "options": {...}}` or a ready choice.

        Methods combine as `"snapkv:budget=25%+kivi:bits=4"` or as a list of the above.
        """
        if isinstance(value, MethodChoice):
            return value
        if isinstance(value, str):
            parts: Sequence[Any] = _split_methods(value, registry)
            if len(parts) == 1:
                name, raw = split_method(value, registry.seam)
                return cls(name, registry.build_options(name, raw))
            return cls._combined(parts, registry)
        if isinstance(value, Mapping):
            if isinstance(value.get("with"), (list, tuple)):
                alone = {key: item for key, item in value.items() if key != "with"}
                return cls._combined([alone, *value["with"]], registry)
            unknown = [key for key in value if key not in ("name", "options")]
            if unknown or "name" not in value:
                raise ConfigError(
                    f"{registry.seam} is {dict(value)!r}; write a string such as 'full' or a mapping with "
                    "'name' and 'options' (and 'with' for a list of methods it is combined with)"
                )
            name, raw = str(value["name"]), value.get("options") or {}
            if not isinstance(raw, Mapping):
                raise ConfigError(f"the options of {registry.seam} {name!r} are {raw!r}; write a mapping")
            return cls(name, registry.build_options(name, raw))
        if isinstance(value, (list, tuple)) and value:
            return cls._combined(value, registry)
        raise ConfigError(f"{registry.seam} is {value!r}; write a string such as 'full', or a mapping")

    @classmethod
    def _combined(cls, parts: Sequence[Any], registry: Registry) -> MethodChoice:
        """Several methods as one choice, the first in the order in which they work leading."""
        choices = [one for part in parts for one in cls.parse(part, registry).all]
        if len(choices) > 1:
            if registry is not KV_CACHES:
                names = " and ".join(repr(c.name) for c in choices)
                raise ConfigError(f"{registry.seam} methods cannot be combined, and {names} are given")
            from trimtab.kvcache.paging.combine import in_order

            choices = in_order(choices)
        return cls(choices[0].name, choices[0].options, tuple(choices[1:]))

    @property
    def all(self) -> list[MethodChoice]:
        """Each of the combined methods by itself."""
        return [MethodChoice(self.name, self.options), *self.then]

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, and those a method always wants shown.

        A method marks such an option with `field(default=..., metadata={"label": True})`.
        """
        shown = {}
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if value != default or field.metadata.get("label"):
                shown[field.name] = value
        return shown

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every option spelled out."""
        values = {f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options)}
        options = {key: _plain(value) for key, value in values.items()}
        plain: dict[str, Any] = {"name": self.name, "options": options}
        if self.then:
            plain["with"] = [choice.to_dict() for choice in self.then]
        return plain

    def __str__(self) -> str:
        # A plus inside a text could look like the beginning of another method.
        options = ",".join(
            f"{key}={_quote(value_text(value), ',+' if isinstance(value, str) else ',')}"
            for key, value in self.changed().items()
        )
        text = f"{self.name}:{options}" if options else self.name
        return "+".join([text, *map(str, self.then)])


def _split_methods(text: str, registry: Registry) -> list[str]:
    """Parts of `"snapkv:budget=64+kivi"`: a plus before a method's name, outside quotes, begins a new one."""
    known = {*registry.names(), *registry._methods}
    names = "|".join(sorted(map(re.escape, known), key=len, reverse=True))
    pieces, quote, start = [], "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "+" and re.match(rf"\s*({names})\s*([:+]|$)", text[i + 1 :]):
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def split_method(text: str, seam: str) -> tuple[str, dict[str, str]]:
    """`"kivi:bits=2,group_size=32"` as `("kivi", {"bits": "2", "group_size": "32"})`."""
    name, colon, rest = text.strip().partition(":")
    if not name or (colon and not rest.strip()):
        raise ConfigError(f"{seam} is {text!r}; write METHOD or METHOD:option=value,option=value")
    options: dict[str, str] = {}
    for item in _split(rest, ",", f"{seam} {text!r}"):
        key, equals, value = item.partition("=")
        key = key.strip()
        if not key or not equals:
            raise ConfigError(f"{seam} is {text!r}: {item!r} is not of the form option=value")
        if key in options:
            raise ConfigError(f"{seam} is {text!r}: the option {key!r} is given twice")
        options[key] = value
    return name.strip(), options


def _split(text: str, separator: str, where: str) -> list[str]:
    """Parts of `text` between separators; quotes hold a part together, as in a shell."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = separator, True, ""
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"{where} has a quote that is not closed ({error})") from None


def value_text(value: Any) -> str:
    """A plain value as it is written in a plan string."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(value_text(item) for item in value)
    return str(value)


def _join(words: Iterable[str]) -> str:
    """Words of a plan string."""
    return " ".join(_quote(word, " \t\r\n") for word in words)


def _quote(text: str, separators: str) -> str:
    """`text` so that `_split` keeps it whole."""
    if not set(text) & {*separators, *"'\"\\"}:
        return text
    return "'" + text.replace("'", "'\"'\"'") + "'"


@dataclass(frozen=True, slots=True, init=False)
class Plan:
    """A model, one choice per seam, and the engine's bounds.

    `model`            folder, hub id or name of a shipped model; None = the shipped model `tiny`.
    `adapter`          folder of a LoRA adapter, trimtab's or PEFT's, merged into the weights; None = none.
    `dtype`            `auto` (as stored in the checkpoint), `float32`, `bfloat16` or `float16`.
    `device`           `auto`, `cpu`, `cuda` or `cuda:N`.
    `weights`          how the model's matrices are stored: `plain`, or a method such as `int8`.
    `cache`            the KV-cache policy with its options.
    `kv_memory`        bound on KV-cache bytes; None = the engine's default bound.
    `max_batch`        requests computed together at most.
    `max_step_tokens`  tokens computed in one engine step at most (prompts are chunked to it).
    `prefix_caching`   whether prompts with a common beginning share its computation.
    `backend`          `native` (C++ kernels for CPUs), `torch`, or `auto` for the faster one that fits.
    `threads`          CPU threads; None = all cores.
    """

    model: str | None
    adapter: str | None
    dtype: str
    device: str
    weights: MethodChoice
    cache: MethodChoice
    kv_memory: int | None
    max_batch: int
    max_step_tokens: int
    prefix_caching: bool
    backend: str
    threads: int | None

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        weights: str | Mapping[str, Any] | MethodChoice = "plain",
        cache: str | Mapping[str, Any] | Sequence[Any] | MethodChoice = "full",
        kv_memory: int | str | None = None,
        max_batch: int | str = 32,
        max_step_tokens: int | str = 512,
        prefix_caching: bool | str = True,
        backend: str = "auto",
        threads: int | str | None = None,
    ) -> None:
        values = {
            "model": None if _is_none(model) else str(model),
            "adapter": None if _is_none(adapter) else str(adapter),
            "dtype": _dtype(dtype),
            "device": _device(device),
            "weights": MethodChoice.parse(weights, WEIGHTS),
            "cache": MethodChoice.parse(cache, KV_CACHES),
            "kv_memory": None if _is_none(kv_memory) else parse_bytes(kv_memory, "kv_memory"),
            "max_batch": _count(max_batch, "max_batch"),
            "max_step_tokens": _count(max_step_tokens, "max_step_tokens"),
            "prefix_caching": _flag(prefix_caching, "prefix_caching"),
            "backend": _choice(backend, BACKENDS, "backend"),
            "threads": None if _is_none(threads) else _count(threads, "threads"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """A plan from `key=value` words; a word that names a method (`kivi:bits=2`) means the cache."""
        values: dict[str, Any] = {}
        if not text.strip():
            raise ConfigError("a plan is empty; write for example 'full' or 'cache=kivi:bits=2'")
        for word in _split(text, " \t\r\n", f"plan {text!r}"):
            setting = re.match(r"([^:=]*)=(.*)", word, re.DOTALL)
            key, value = setting.groups() if setting else ("cache", word)
            if key in values:
                raise ConfigError(f"plan {text!r} gives {key!r} twice")
            values[key] = value
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """A plan from plain values, as YAML or JSON gives them; unknown keys are errors."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown setting {key!r} in a plan.{did_you_mean(str(key), known)}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """A plan from a YAML file. Relative folders (`model`, `adapter`) are sought beside the file first."""
        import yaml

        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the plan {str(path)!r}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"the plan {str(path)!r} is not valid YAML: {reason}") from None
        if not isinstance(values, Mapping):
            raise ConfigError(f"the plan {str(path)!r} must be a YAML mapping such as 'cache: kivi:bits=2'")
        try:
            plan = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"in the plan {str(path)!r}: {error}") from None
        folders = {"model": plan.model, "adapter": plan.adapter}
        beside = {key: path.parent / name for key, name in folders.items() if name is not None}
        return plan.with_(**{key: folder for key, folder in beside.items() if folder.is_dir()})

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Path | Plan) -> Plan:
        """A plan from whatever names one: a plan, a mapping, a YAML file's path, or a plan string."""
        if isinstance(value, Plan):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, Path) or value.endswith((".yaml", ".yml")):
            return cls.from_file(value)
        return cls.parse(value)

    def with_(self, **changes: Any) -> Plan:
        """A copy with some settings changed, checked like a new plan."""
        return Plan.from_dict({**self._shallow(), **changes})

    def _shallow(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Every setting as a plain value; `from_dict` gives the same plan back."""
        return {**self._shallow(), "weights": self.weights.to_dict(), "cache": self.cache.to_dict()}

    def to_yaml(self) -> str:
        """Every setting as YAML; a file with this text gives the same plan back."""
        import yaml

        # Escaped to ASCII: PyYAML writes some rare line separators so that it reads them back as spaces.
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def label(self) -> str:
        """A short name for tables: the cache, then the settings that differ from their defaults."""
        words = [str(self.cache)]
        words += [f"{k}={value_text(v)}" for k, v in self._changed().items() if k not in ("model", "cache")]
        return _join(words)

    def _changed(self) -> dict[str, Any]:
        return {key: value for key, value in self._shallow().items() if value != getattr(_defaults(), key)}

    def __str__(self) -> str:
        """The shortest plan string that parses back to this plan."""
        return _join([f"{key}={value_text(value)}" for key, value in self._changed().items()]) or "full"

    def problems(self, config: ModelConfig) -> list[str]:
        """Every reason why this plan cannot run a model of `config`; empty when it can."""
        found = []
        if self.backend == "native" and self.device.startswith("cuda"):
            found.append(f"backend=native is for CPUs, but device={self.device}; choose backend=torch")
        if self.cache.then:
            from trimtab.kvcache.paging import combine

            found += combine.problems(self.cache.all)
        for choice in self.cache.all:
            ask = getattr(KV_CACHES.get(choice.name).cls, "problems", None)
            if ask is not None:
                found += [f"cache {choice}: {reason}" for reason in ask(choice.options, self, config)]
        return found

    def check(self, config: ModelConfig) -> None:
        """Raise PlanError with every reason when this plan cannot run a model of `config`."""
        reasons = self.problems(config)
        if reasons:
            raise PlanError(reasons)


@cache
def _defaults() -> Plan:
    return Plan()


def _plain(value: Any) -> Any:
    """An option as YAML and JSON write it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if hasattr(value, "parse") else value


def _is_none(value: Any) -> bool:
    return value is None or value == "none"


def _dtype(value: Any) -> str:
    name = str(value).removeprefix("torch.").lower()
    if name not in DTYPES:
        allowed = "auto, float32, bfloat16, float16"
        raise ConfigError(f"dtype is {value!r}; allowed: {allowed}.{_near(name, DTYPES)}")
    return DTYPES[name]


def _device(value: Any) -> str:
    name = str(value).lower()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device is {value!r}; allowed: auto, cpu, cuda or cuda:N")
    return name


def _choice(value: Any, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise ConfigError(f"{what} is {value!r}; allowed: {', '.join(allowed)}.{_near(str(value), allowed)}")
    return value


def _near(word: str, known: Iterable[str]) -> str:
    hint = did_you_mean(word, known)
    return hint if hint.startswith(" Did") else ""


def _count(value: Any, what: str) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number of at least 1")
    return number


def _flag(value: Any, what: str) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "yes", "on"):
        return True
    if str(value).lower() in ("false", "no", "off"):
        return False
    raise ConfigError(f"{what} is {value!r}; it must be true or false")
