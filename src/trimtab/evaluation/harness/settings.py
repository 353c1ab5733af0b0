"""The harness's `model_args` as a plan and a few settings of the adapter; needs neither lm_eval nor torch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import ConfigError, did_you_mean
from trimtab.plan import MethodChoice, Plan, value_text
from trimtab.registry import KV_CACHES

PLAN_SETTINGS = frozenset(f.name for f in dataclasses.fields(Plan))
_OURS = frozenset(
    ("add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "max_batch_size")
    + ("max_gen_toks", "max_length", "plan", "prefix_token_id", "pretrained", "revision")
    + ("think_end_token", "trust_remote_code")
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HarnessSettings:
    """What `--model_args` asks for. The names are those of the harness's `hf` backend where it has them.

    `plan`                what runs; its `model` is `pretrained` (None: the model that ships with trimtab).
    `revision`            branch, tag or commit on the hub.
    `max_length`          tokens a text may have, at most the model's context; None: the context.
    `max_gen_toks`        most tokens to generate where a task does not say.
    `add_bos_token`       whether a text begins with the model's first token; None: as its tokenizer does.
    `prefix_token_id`     what an empty context stands for; None: the first token, or the end token.
    `chat_template_args`  variables for the chat template.
    `think_end_token`     text or token id after which the answer begins.
    """

    plan: Plan = field(default_factory=Plan)
    revision: str | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    think_end_token: str | int | None = None

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> HarnessSettings:
        """From plain values. Raises ConfigError for unknown names and for wrong values."""
        given = _with_cache_options(args)
        known = PLAN_SETTINGS | _OURS
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown model_args setting {name!r}.{did_you_mean(name, known)}")
        if given.pop("trust_remote_code", None):
            _log.warning("trust_remote_code concerns datasets only: trimtab runs no code of a checkpoint")
        chat = given.pop("chat_template_args", None) or {}
        if not isinstance(chat, Mapping):
            raise ConfigError(f"chat_template_args is {chat!r}; it must be a mapping, such as {{'a': 1}}")
        thinking = _flag(given.pop("enable_thinking", None), "enable_thinking")
        if thinking is not None:
            chat = {**chat, "enable_thinking": thinking}
        think_end = given.pop("think_end_token", None)
        if thinking and think_end is None:
            raise ConfigError(
                "enable_thinking is true, but think_end_token is not given; name the text "
                "that ends the thoughts, such as '</think>'"
            )
        if isinstance(think_end, str) and think_end.isdigit():
            think_end = int(think_end)
        max_gen_toks = _count(given.pop("max_gen_toks", None), "max_gen_toks")
        own = {
            "revision": given.pop("revision", None),
            "max_length": _count(given.pop("max_length", None), "max_length"),
            "max_gen_toks": 256 if max_gen_toks is None else max_gen_toks,
            "add_bos_token": _flag(given.pop("add_bos_token", None), "add_bos_token"),
            "prefix_token_id": _count(given.pop("prefix_token_id", None), "prefix_token_id", low=0),
            "chat_template_args": dict(chat),
            "think_end_token": think_end,
        }
        return cls(plan=_plan(given), **own)


def merged(model_args: Mapping[str, Any], flags: Mapping[str, Any] | None, has_cuda: bool) -> dict[str, Any]:
    """`model_args` and what the harness adds from its own flags (device, batch sizes); the former win.

    The harness asks for `cuda:0` when no device is named. Where there is none, that means the CPU, as with
    its `hf` backend; a device named in `model_args` is taken at its word.
    """
    added = {key: value for key, value in (flags or {}).items() if value is not None}
    if str(added.get("device", "")).startswith("cuda") and not has_cuda:
        _log.info("no CUDA device here: running on the CPU")
        del added["device"]
    return {**added, **model_args}


def _with_cache_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """`args`, with options of the cache's methods put back behind `cache`.

    The harness splits its arguments at every comma, so `cache=kivi:bits=2,group_size=32` arrives as two.
    """
    given = dict(args)
    cache = given.get("cache")
    if not isinstance(cache, str) or ":" not in cache:
        return given
    options = {
        f.name for one in MethodChoice.parse(cache, KV_CACHES).all for f in dataclasses.fields(one.options)
    }
    for name in [name for name in given if name in options - PLAN_SETTINGS - _OURS]:
        given["cache"] += f",{name}={value_text(given.pop(name))}"
    return given


def _plan(given: dict[str, Any]) -> Plan:
    """The plan that the remaining settings describe."""
    batch, most = given.pop("batch_size", None), _count(given.pop("max_batch_size", None), "max_batch_size")
    if "max_batch" not in given:
        if batch is not None and not str(batch).startswith("auto"):
            given["max_batch"] = _count(batch, "batch_size")
        elif most is not None:
            given["max_batch"] = most
    if "pretrained" in given:
        if "model" in given:
            raise ConfigError("model_args give both 'pretrained' and 'model'; they mean the same, give one")
        given["model"] = given.pop("pretrained")
    whole = given.pop("plan", None)
    if whole is None:
        return Plan.from_dict(given)
    return Plan.of(whole).with_(**given)


def _count(value: Any, what: str, low: int = 1) -> int | None:
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= low):
        return value
    raise ConfigError(f"{what} is {value!r}; it must be a whole number of at least {low}")


def _flag(value: Any, what: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise ConfigError(f"{what} is {value!r}; it must be true or false")
