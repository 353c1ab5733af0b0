"""Constraints through the whole engine, against brute force over small languages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.fakes import fake_engine, greedy, next_token, prompt
from kvcache.policies import make_engine, small_model, text
from trimtab import Engine, SamplingParams
from trimtab.decoding.constraints.base import Constraint, ConstraintState, Mask, StructuredOutputs
from trimtab.engine import constraining
from trimtab.errors import RequestError

END = 2
Words = Sequence[tuple[int, ...]]


class WordState(ConstraintState):
    """A way through a finite set of texts."""

    def __init__(self, words: Words, breaks_after: int | None = None) -> None:
        self.words = words
        self.said: list[int] = []
        self.breaks_after = breaks_after

    def _next(self) -> set[int]:
        n = len(self.said)
        if self.said[-1:] == [END]:
            return set()
        found = {w[n] for w in self.words if len(w) > n and list(w[:n]) == self.said}
        return found | ({END} if self.accepting else set())

    def fill_mask(self, out: Mask) -> bool:
        out[:] = 0
        for token in self._next():
            out[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
        return True

    def advance_many(self, tokens: Sequence[int]) -> int:
        for i, token in enumerate(tokens):
            if token not in self._next() or self.error:
                return i
            self.said.append(token)
        return len(tokens)

    def rollback(self, count: int) -> None:
        del self.said[len(self.said) - count :]

    def fork(self) -> WordState:
        other = WordState(self.words, self.breaks_after)
        other.said = list(self.said)
        return other

    def forced_tokens(self) -> list[int]:
        probe, forced = self.fork(), []
        while len(probe._next()) == 1 and not probe.accepting:
            [token] = probe._next()
            probe.said.append(token)
            forced.append(token)
        # What must come last is not forced, so that the engine draws something in every step.
        return forced[:-1] if probe.stopped else forced

    @property
    def accepting(self) -> bool:
        return tuple(self.said) in self.words

    @property
    def stopped(self) -> bool:
        return self._next() <= {END}

    @property
    def error(self) -> str | None:
        broken = self.breaks_after is not None and len(self.said) >= self.breaks_after
        return "the parser met its limit" if broken else None


class WordConstraint(Constraint):
    def __init__(
        self,
        words: Words,
        check: Callable[[str], str | None] | None = None,
        breaks_after: int | None = None,
    ) -> None:
        self.words = words
        self.exact = check is None
        self._check = check
        self.breaks_after = breaks_after

    def start(self) -> WordState:
        return WordState(self.words, self.breaks_after)

    def check(self, text: str) -> str | None:
        return None if self._check is None else self._check(text)


def keep_to(engine: Engine, constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compile", lambda wish: constraint)


WISH = StructuredOutputs(json_object=True)
WORDS: Words = [(9, 8, 7), (9, 8, 6, 5), (4,), (4, 3), (11, 12, 13, 14, 15), (11, 12, 13, 14, 16, 17)]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**(dict(max_tokens=12, temperature=0.0, structured_outputs=WISH) | changes))


@torch.no_grad()
def best_word(start: list[int], words: Words) -> list[int]:
    """What greedy decoding under the mask must say, from the plain forward of the model."""
    state, said = WordState(words), []
    while not state.stopped:
        row = small_model()(torch.tensor([start + said]))[0, -1]
        token = max(state._next(), key=lambda t: (float(row[t]), -t))
        if token == END:
            break
        state.advance(token)
        said.append(token)
    return said


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("slow_masks", [False, True])
def test_greedy_texts_are_those_of_the_masked_model(
    backend: str, slow_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraining, "_HAND_OVER_S", -1.0 if slow_masks else 1e9)
    engine = make_engine("full", backend)
    keep_to(engine, WordConstraint(WORDS), monkeypatch)
    starts = [text(20, seed) for seed in range(12)]
    outs = engine.generate(starts, params())
    wanted = [best_word(start, WORDS) for start in starts]
    assert [[t for t in o.token_ids if t != END] for o in outs] == wanted
    assert {tuple(w) for w in wanted} != {tuple(wanted[0])}, "the texts differ, or nothing was tested"
    assert {o.finish_reason for o in outs} == {"stop"}


def test_forced_tokens_change_nothing_but_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities need every token's own logits, so there nothing is taken over unseen."""
    engine = make_engine("full", "native")
    keep_to(engine, WordConstraint(WORDS), monkeypatch)
    starts, texts, steps = [text(20, seed) for seed in range(6)], [], []
    for logprobs in (None, 0):
        engine.reset_stats()
        outs = engine.generate(starts, params(temperature=1.0, seed=5, logprobs=logprobs))
        texts.append([o.token_ids for o in outs])
        steps.append(engine.stats().steps)
    assert texts[0] == texts[1]
    assert steps[0] < steps[1]
    assert all(o.logprobs and len(o.logprobs) == len(o.token_ids) for o in outs)


def test_a_text_ends_at_once_where_nothing_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = fake_engine()
    keep_to(engine, WordConstraint([(9, 8, 7)]), monkeypatch)
    [out] = engine.generate([prompt(5)], params())
    assert (out.token_ids, out.finish_reason) == ([9, 8, 7], "stop")
    assert len(runner.steps) == 2, "two forced tokens, then the last one is drawn"


def test_length_is_said_where_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = fake_engine()
    keep_to(engine, WordConstraint([(9, 8, 7, 6, 5)]), monkeypatch)
    [out] = engine.generate([prompt(5)], params(max_tokens=3))
    assert (out.token_ids, out.finish_reason) == ([9, 8, 7], "length")


def test_neighbours_and_preemption_leave_a_constrained_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [tuple(3 + (a * b) % 40 for b in range(1, 30)) for a in range(1, 30)]
    settings = params(max_tokens=40, temperature=1.0, seed=3)
    roomy, _ = fake_engine()
    keep_to(roomy, WordConstraint(words), monkeypatch)
    alone = roomy.generate([prompt(30, 1)], settings)[0].token_ids
    engine, _ = fake_engine(blocks=7)
    monkeypatch.setattr(engine, "compile", lambda wish: WordConstraint(words))
    many = [prompt(30, seed) for seed in (1, 2, 3)]
    free = greedy(25)
    outs = engine.generate([*many[1:], many[0]], [free, free, settings])
    assert outs[2].metrics.preemptions, "memory was too roomy to test this"
    assert outs[2].token_ids == alone
    for start, out in zip(many[1:], outs[:2], strict=True):
        tokens = list(start)
        for token in out.token_ids:
            assert token == next_token(tokens)
            tokens.append(token)


PAIRS: Words = [(a, b, c) for a in (3, 4, 5) for b in (6, 7, 8) for c in (9, 10)]


def only(engine: Engine, wanted: tuple[int, ...] | None) -> tuple[Callable[[str], str | None], list[str]]:
    """A check that accepts one of PAIRS; it sees texts, so the fake tokenizer writes ids."""
    seen: list[str] = []

    def check(text: str) -> str | None:
        seen.append(text)
        return None if wanted is not None and text == say(wanted) else "it is not the one"

    return check, seen


def say(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens)) + " "


class IdText:
    """Writes every token as its number."""

    def __init__(self, *_: Any) -> None: ...

    def push(self, token: int) -> str:
        return "" if token == END else f"{token} "

    def flush(self) -> str:
        return ""


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> Engine:
    from trimtab.engine import engine as module

    engine, _ = fake_engine()
    monkeypatch.setattr(module, "Detokenizer", IdText)
    monkeypatch.setattr(
        engine.model, "tokenizer", type("T", (), dict(available=True, eos_ids=frozenset({END})))(), False
    )
    return engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wanted", PAIRS[::5])
def test_a_rejected_text_is_written_again_until_it_is_right(
    talking: Engine, temperature: float, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    check, seen = only(talking, wanted)
    keep_to(talking, WordConstraint(PAIRS, check), monkeypatch)
    [out] = talking.generate([prompt(5)], params(temperature=temperature, seed=1))
    assert (tuple(out.token_ids), out.text, out.finish_reason) == (wanted, say(wanted), "stop")
    assert len(set(seen)) == len(seen) <= len(PAIRS), "no text was tried twice"
    assert out.metrics.completion_tokens == 3


def test_where_nothing_is_right_the_reason_is_told(talking: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    check, seen = only(talking, None)
    keep_to(talking, WordConstraint(PAIRS, check), monkeypatch)
    pieces = list(talking.stream(prompt(5), params()))
    [piece] = pieces
    assert piece.finish_reason == "length" and "it is not the one" in str(piece.stop_reason)
    assert 1 < len(set(seen)) == len(seen)
    assert talking.stats().kv_bytes_held == 0
    talking.cache.check()


def test_a_text_that_may_be_taken_back_is_not_streamed(
    talking: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, seen = only(talking, (5, 8, 10))
    keep_to(talking, WordConstraint(PAIRS, check), monkeypatch)
    [piece] = talking.stream(prompt(5), params(temperature=1.0, seed=0))
    assert (piece.text, piece.token_ids) == (say((5, 8, 10)), [5, 8, 10])
    assert len(seen) > 1, "it was right at once, so nothing was tested"


def test_penalties_and_logprobs_follow_a_text_that_is_taken_back(
    talking: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, _ = only(talking, (5, 6, 9))
    keep_to(talking, WordConstraint(PAIRS, check), monkeypatch)
    [out] = talking.generate([prompt(5)], params(temperature=1.0, seed=0, logprobs=0, frequency_penalty=0.5))
    assert out.logprobs is not None
    assert [x.token_id for x in out.logprobs] == [5, 6, 9]
    assert out.outputs[0].cumulative_logprob == pytest.approx(sum(x.logprob for x in out.logprobs))


def test_a_constraint_that_breaks_ends_only_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = fake_engine()
    keep_to(engine, WordConstraint([(3, 4, 5, 6), (3, 5, 5, 6), (3, 4, 4, 6)], breaks_after=1), monkeypatch)
    broken = engine.submit(prompt(5), params(logprobs=0))
    sound = engine.submit(prompt(5, 1), greedy(5))
    while engine.scheduler.has_work:
        engine.step()
    assert "the parser met its limit" in (broken[0].error or "")
    assert broken[0].fault is RequestError
    assert sound[0].finish_reason == "length" and len(sound[0].output_ids) == 5


@pytest.mark.parametrize("field", ["stop", "stop_token_ids"])
def test_what_could_cut_the_text_short_is_refused(field: str) -> None:
    with pytest.raises(RequestError, match=f"{field} cannot be combined with structured_outputs"):
        params(**{field: ["x"] if field == "stop" else [5]})


@pytest.mark.parametrize(
    "wish, message",
    [
        ({}, "exactly one of .* found none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .* found regex and choice"),
        ({"regexp": "a"}, "no field 'regexp'. Did you mean 'regex'"),
        ({"regex": ""}, "regex is ''"),
        ({"choice": []}, "choice is"),
        ({"choice": "ab"}, "choice is 'ab'; it must be a list"),
        ({"choice": ["a", 1]}, "something else than non-empty texts"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": 3}, "a JSON schema is an object"),
        ({"json_object": "yes"}, "json_object is 'yes'; it must be true or false"),
        ("json", "structured_outputs is 'json'; it must be an object"),
    ],
)
def test_wishes_that_make_no_sense(wish: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(structured_outputs=wish)


def test_masks_of_a_step_that_failed_are_done_before_the_next_ones_begin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constraining, "_HAND_OVER_S", -1.0)
    engine, runner = fake_engine()
    inside: list[int] = []

    class Slow(WordState):
        def fill_mask(self, out: Mask) -> bool:
            inside.append(1)
            time.sleep(0.05)
            assert sum(inside) == 1, "two masks of one text are filled at once"
            inside.pop()
            return super().fill_mask(out)

    constraint = WordConstraint([(9, 8, 7)])
    monkeypatch.setattr(constraint, "start", lambda: Slow([(9, 8, 7)]))
    keep_to(engine, constraint, monkeypatch)
    [request] = engine.submit(prompt(5), params())
    original = runner.run

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    monkeypatch.setattr(runner, "run", original)
    monkeypatch.setattr(constraining, "_HAND_OVER_S", 1e9)  # the next ones are filled in this thread
    while engine.scheduler.has_work:
        engine.step()
    assert request.output_ids == [9, 8, 7]
