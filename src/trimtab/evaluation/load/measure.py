"""The whole measurement: look at the server, make the prompts, find the rates, put load on it, sum up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluation.load.arrivals import poisson
from trimtab.evaluation.load.client import Client
from trimtab.evaluation.load.lengths import LengthMix
from trimtab.evaluation.load.prompts import Ask, Form, Workload, read_prompts
from trimtab.evaluation.load.reading import Answer, read
from trimtab.evaluation.load.run import Run, closed_loop, open_loop
from trimtab.evaluation.load.server import DEFAULT_CONTEXT, Served, served
from trimtab.evaluation.load.slo import Slo
from trimtab.evaluation.load.summary import Summary, summarise

FRACTIONS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1)  # of the closed-loop capacity, for `auto`
SAMPLE_CHARACTERS = 1200  # of text that the server is asked to count

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. `rates` None: find the capacity with `clients` first, then take `FRACTIONS` of it."""

    rates: tuple[float, ...] | None = None
    duration: float = 30.0
    warmup: float = 5.0
    slo: Slo = field(default_factory=lambda: Slo.parse("ttft=200ms,itl=50ms"))
    mix: LengthMix = field(default_factory=LengthMix)
    prompts: Path | None = None
    clients: int = 32
    chat: bool | None = None  # None: chat for `prompts` if the model can, else plain completion
    temperature: float = 0.0
    ignore_eos: bool | None = None  # None: yes for drawn passages, no for real prompts
    plain: bool = False
    context: int | None = None
    seed: int = 0


@dataclass(slots=True)
class Measured:
    """Summaries in the order in which they were taken, with what was asked of which model."""

    served: Served
    form: Form
    workload: Workload
    summaries: list[Summary]
    answers: list[list[Answer]]
    capacity: float | None = None  # closed-loop requests/s
    left_out: int = 0  # prompts that do not fit into the context
    notes: tuple[str, ...] = ()


async def measure(
    client: Client,
    settings: Settings,
    model: str | None = None,
    progress: Progress = lambda what, share: None,
    shown: Callable[[Summary], None] = lambda summary: None,
) -> Measured:
    """Put load on the server behind `client`. `shown` gets each summary as soon as it is there."""
    found = await served(client, model)
    form, workload, notes = await _prepare(client, settings, found)
    left_out = len(workload.prompts or ()) - len(workload.fitting())
    result = Measured(found, form, workload, [], [], left_out=left_out, notes=notes)

    def keep(run: Run, **kind: Any) -> Summary:
        answers = [read(exchange, form.stream) for exchange in run.exchanges]
        summary = summarise(answers, run.start, run.seconds, settings.slo, client_cpu=run.client_cpu, **kind)
        result.summaries.append(summary)
        result.answers.append(answers)
        shown(summary)
        return summary

    rates = settings.rates
    times = {"warmup": settings.warmup, "seconds": settings.duration}
    if rates is None:
        what = f"closed loop of {settings.clients} clients"
        run = await closed_loop(
            client,
            _requests(client, form, workload, settings.seed),
            settings.clients,
            progress=lambda share: progress(what, share),
            **times,
        )
        summary = keep(run, clients=settings.clients)
        result.capacity = summary.achieved_rate
        if not summary.done or not summary.achieved_rate:
            reason = next(iter(summary.errors), "no request ended within the duration; measure longer")
            raise TrimtabError(f"the capacity could not be measured: {reason}")
        rates = tuple(float(f"{fraction * summary.achieved_rate:.3g}") for fraction in FRACTIONS)
    for i, rate in enumerate(rates):
        # Each rate has prompts and arrivals of its own, the same whatever the other rates are.
        seed = settings.seed + 1000 * (i + 1)
        arrivals = poisson(rate, settings.warmup + settings.duration, random.Random(seed))
        what = f"{rate:g} requests/s"
        run = await open_loop(
            client,
            _requests(client, form, workload, seed),
            arrivals,
            progress=lambda share, what=what: progress(what, share),
            **times,
        )
        keep(run, rate=rate)
    return result


async def _prepare(
    client: Client, settings: Settings, found: Served
) -> tuple[Form, Workload, tuple[str, ...]]:
    from trimtab.evaluation.corpus import shipped_text

    texts = None if settings.prompts is None else tuple(read_prompts(settings.prompts))
    chat = bool(texts and found.chat) if settings.chat is None else settings.chat
    ignore_eos = texts is None if settings.ignore_eos is None else settings.ignore_eos
    form = Form(
        found.name,
        chat,
        temperature=settings.temperature,
        ignore_eos=ignore_eos and not settings.plain,
        plain=settings.plain,
    )
    context = settings.context or found.context
    notes = () if context else (f"the server does not tell its context; taken as {DEFAULT_CONTEXT} tokens",)
    context = context or DEFAULT_CONTEXT
    text = shipped_text()
    sample = (text if texts is None else " ".join(texts))[: min(SAMPLE_CHARACTERS, context)]
    per_token = await _characters_per_token(client, form, sample)
    return form, Workload(settings.mix, context, per_token, text, texts), notes


async def _characters_per_token(client: Client, form: Form, text: str) -> float:
    """Asks the server how many tokens it makes of `text`; also its first, slow request."""
    asked = Form(form.model, chat=False, stream=False, plain=form.plain, ignore_eos=False)
    exchange = await client.send(client.request(asked.path, asked.body(Ask(text, 0, 1))))
    answer = read(exchange, stream=False)
    if answer.error is not None or not answer.prompt_tokens:
        raise TrimtabError(f"the server at {client.url} refused a first request: {answer.error}")
    return len(text) / answer.prompt_tokens


def _requests(client: Client, form: Form, workload: Workload, seed: int) -> Iterator[bytes]:
    for ask in workload.draw(seed):
        yield client.request(form.path, form.body(ask))


def parse_rates(text: str) -> tuple[float, ...] | None:
    """`"1,2,4"` as requests a second; None for `"auto"`."""
    if text.strip() == "auto":
        return None
    rates = []
    for word in text.split(","):
        try:
            rate = float(word)
        except ValueError:
            rate = -1.0
        if not 0 < rate <= 1e5:
            raise TrimtabError(f"--rates is {text!r}; write requests a second such as '1,2,4,8', or 'auto'")
        rates.append(rate)
    return tuple(rates)


def describe(measured: Measured, settings: Settings) -> dict[str, Any]:
    """The settings as plain values, for the record."""
    return {
        "model": measured.served.name,
        "plan": (measured.served.record.get("trimtab") or {}).get("plan"),
        "server": measured.served.record,
        "endpoint": measured.form.path,
        "prompts": settings.prompts and settings.prompts.name,
        "prompts_left_out": measured.left_out,
        "lengths": {name: getattr(settings.mix, name) for name in settings.mix.__slots__},
        "context": measured.workload.context,
        "characters_per_token": measured.workload.characters_per_token,
        "temperature": settings.temperature,
        "ignore_eos": measured.form.ignore_eos,
        "duration": settings.duration,
        "warmup": settings.warmup,
        "slo": dict(settings.slo.bounds),
        "capacity": measured.capacity,
        "arrivals": "poisson",
    }


def to_jsonl(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
