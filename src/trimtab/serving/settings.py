"""The server's settings, and the four places they come from.

Flags win over the environment (`TRIMTAB_SERVE_<NAME>`), which wins over the YAML file of `--config`, which
wins over the defaults. Every value is parsed where it enters, so that a mistake names the place it stands in.
This module imports neither torch nor the web framework.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, did_you_mean
from trimtab.models.hub import DEFAULT
from trimtab.plan import Plan
from trimtab.serving import values
from trimtab.serving.sources import Given, from_environment, from_file, from_flags
from trimtab.sizes import parse_bytes

PLAN_OPTIONS = ("model", "adapter", "weights", "cache", "dtype", "device", "threads", "kv_memory", "backend")
SHARED = ("model", "adapter", "dtype", "device")  # of the one model that all plans run on


def _setting(default: Any, parse: Callable[[Any, str], Any], help: str, **more: Any) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help}, **more)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """All that `trimtab serve` can be told, checked on construction (durations in seconds, sizes in bytes).

    Raises ConfigError naming the setting, the value and what may be written.
    """

    plans: tuple[Plan, ...] = _setting(
        (Plan(),), values.each(values.plan), "what runs, the first under the bare name"
    )
    served_model_name: str | None = _setting(None, values.text_or_none, "the name clients ask for")
    tool_format: str = _setting("auto", values.tool_format, "how the model writes tool calls")
    host: str = _setting("127.0.0.1", values.text, "the address to listen on")
    port: int = _setting(8000, values.count(0, 65535), "the port to listen on; 0 takes a free one")
    root_path: str = _setting("", values.root_path, "the path under which a proxy publishes the server")
    api_key: tuple[str, ...] = _setting((), values.each(values.key), "keys that /v1 asks for", repr=False)
    cors_origins: tuple[str, ...] = _setting(
        (), values.each(values.origin), "web origins that may call from a browser"
    )
    playground: bool = _setting(True, values.flag, "serve the page at /")
    max_queue: int = _setting(256, values.count(1), "most completions waiting; more are answered 429")
    max_n: int = _setting(128, values.count(1), "most completions of one request, all prompts together")
    max_body: int = _setting(8 << 20, parse_bytes, "largest request body; larger ones are answered 413")
    request_timeout: float | None = _setting(None, values.seconds_or_none, "longest time for one request")
    drain_timeout: float = _setting(30.0, values.seconds, "on SIGTERM, time for running requests to end")
    stream_interval: float | None = _setting(
        None, values.seconds_or_auto, "least time between two chunks of a stream"
    )
    log_requests: bool = _setting(True, values.flag, "write one JSON line for each request")
    log_prompts: bool = _setting(False, values.flag, "put prompts into those lines")
    log_file: str | None = _setting(None, values.text_or_none, "where those lines go; none: stderr")
    access_log: bool = _setting(False, values.flag, "write a line for every HTTP request to stderr")

    def __post_init__(self) -> None:
        for name, parse in PARSERS.items():
            object.__setattr__(self, name, parse(getattr(self, name), name))
        for name in ("log_prompts", "log_file"):
            if getattr(self, name) and not self.log_requests:
                raise ConfigError(f"{name} has no effect while log_requests is off; leave one of them out")
        _check_plans(self.plans)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the plans are served under: the first plan's, and `name:label` for the others."""
        name = self.served_model_name or _name_of(self.plans[0].model)
        # What holds for all plans tells none of them apart.
        common = {
            f.name: getattr(Plan(), f.name)
            for f in dataclasses.fields(Plan)
            if len({str(getattr(plan, f.name)) for plan in self.plans}) == 1
        }
        labels = [plan.with_(**common).label for plan in self.plans]
        return (name, *(f"{name}:{label}" for label in labels[1:]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values as a `--config` file has them, without the API keys."""
        plain: dict[str, Any] = {}
        for name in PARSERS:
            value = getattr(self, name)
            if name == "plans":
                value = [str(plan) for plan in value]
            plain[name] = list(value) if isinstance(value, tuple) else value
        del plain["api_key"]
        return plain


PARSERS: dict[str, Callable[[Any, str], Any]] = {
    item.name: item.metadata["parse"] for item in dataclasses.fields(ServerSettings)
}
NAMES = (*PARSERS, *PLAN_OPTIONS)


def gather(
    flags: Mapping[str, Any], environ: Mapping[str, str] | None = None, config: str | None = None
) -> tuple[ServerSettings, dict[str, str]]:
    """The effective settings, and for each setting that was given the place it came from.

    `flags` has None for what was not given. Besides the fields of `ServerSettings` there are the options that
    other commands have too (`model`, `cache`, ...), which go into the plans.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, Given] = {}
    lists = {name for name, value in PARSERS.items() if isinstance(getattr(DEFAULTS, name), tuple)}
    config = config or environ.get("TRIMTAB_SERVE_CONFIG") or None
    for layer in (
        from_file(config) if config else {},
        from_environment(environ, lists),
        from_flags(flags),
    ):
        for name, given in layer.items():
            if name not in NAMES:
                raise ConfigError(f"{given.place}: unknown setting {name!r}.{did_you_mean(name, NAMES)}")
            found[name] = given
    chosen = {name: _parsed(name, given) for name, given in found.items() if name in PARSERS}
    if any(name in found for name in ("plans", *PLAN_OPTIONS)):
        chosen["plans"] = _plans(chosen.get("plans", (Plan(),)), found)
    return ServerSettings(**chosen), {name: given.place for name, given in found.items()}


def _parsed(name: str, given: Given) -> Any:
    value = given.value
    try:
        return PARSERS[name](value, name)
    except ConfigError as error:
        raise ConfigError(f"{given.place}: {error}") from None


def _plans(plans: tuple[Plan, ...], found: Mapping[str, Given]) -> tuple[Plan, ...]:
    """The plans with the options beside them put over each.

    As in other commands an option wins over the plan, unless the plan comes from a place that ranks higher:
    then the option fills in what the plan leaves as it is by default, and its cache stays.
    """
    rank = found["plans"].rank if "plans" in found else -1
    for name in PLAN_OPTIONS:
        if name not in found:
            continue
        given = found[name]
        try:
            if given.rank >= rank:
                plans = tuple(plan.with_(**{name: given.value}) for plan in plans)
            elif name != "cache":
                default = getattr(Plan(), name)
                plans = tuple(
                    plan.with_(**{name: given.value}) if getattr(plan, name) == default else plan
                    for plan in plans
                )
        except ConfigError as error:
            raise ConfigError(f"{given.place}: {error}") from None
    return plans


def _name_of(model: str | None) -> str:
    """What a model is called by default: its folder's name, or its hub id."""
    if model is None:
        return DEFAULT
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


def _check_plans(plans: tuple[Plan, ...]) -> None:
    """All plans of a server run on one loaded model, and each has a name of its own."""
    if not plans:
        raise ConfigError("plans is empty; give at least one, for example 'full'")
    for name in SHARED:
        different = sorted({str(getattr(plan, name)) for plan in plans})
        if len(different) > 1:
            raise ConfigError(
                f"the plans differ in {name} ({', '.join(different)}), but one server runs them all on one "
                "loaded model; start a server for each"
            )
    labels = [plan.label for plan in plans]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"the plan {label!r} is given twice; every plan is served under its own name")


DEFAULTS = ServerSettings()
