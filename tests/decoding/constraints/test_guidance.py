"""States of the parser: masks, rolling back, forks, forced tokens and ends."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from decoding.constraints.helpers import VOCAB, allowed, compiler, constraint, ids, walk
from evaluation.fakes import shipped_tokenizer
from models.tokenizer_zoo import KINDS
from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.decoding.constraints.compiler import Compiler
from trimtab.decoding.constraints.guidance import fill_masks
from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WISHES = [
    {"json": PERSON},
    {"json_object": True},
    {"regex": r"(ab|a)*c{2,5}[0-9]+"},
    {"choice": ["yes", "no", "yes and no"]},
    {"grammar": 'start: "(" start ")" | /[a-z]{9,30}/'},
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda w: next(iter(w)))
def test_masks_are_the_same_after_rolling_back_and_in_forks(wish):
    rng, state = random.Random(0), constraint(**wish).start()
    eos, past = shipped_tokenizer().eos_ids, []
    for _ in range(40):
        choices = [t for t in allowed(state) if t not in eos]
        if not choices:
            break
        past.append((allowed(state), state.accepting, rng.choice(choices)))
        fork = state.fork()
        assert state.advance(past[-1][2])
        assert allowed(fork) == past[-1][0], "a fork stays where it was"
    assert len(past) > 3 or "choice" in wish
    fork = state.fork()
    for mask, accepting, token in reversed(past):
        state.rollback(1)
        assert (allowed(state), state.accepting) == (mask, accepting)
        assert token in mask
    state.advance_many([token for *_, token in past])
    assert allowed(state) == allowed(fork)
    fork.rollback(len(past))
    assert allowed(fork) == past[0][0]


@pytest.mark.parametrize("wish", WISHES, ids=lambda w: next(iter(w)))
def test_what_the_mask_allows_is_what_can_be_taken(wish):
    state, rng = constraint(**wish).start(), random.Random(1)
    for _ in range(6):
        can = set(allowed(state))
        for token in [*rng.sample(range(VOCAB), 300), *rng.sample(sorted(can), min(20, len(can)))]:
            fork = state.fork()
            assert fork.advance(token) == (token in can), token
        choices = sorted(can - shipped_tokenizer().eos_ids)
        if not choices:
            break
        state.advance(rng.choice(choices))


def test_forced_tokens_are_what_stepping_would_take():
    state = constraint(choice=["The quick brown fox", "The quick red fox"]).start()
    forced = state.forced_tokens()
    assert forced and "The quick red fox".startswith(shipped_tokenizer().decode(forced))
    for token in forced:
        assert allowed(state) == [token]
        assert state.advance(token)
    assert len(allowed(state)) > 1 and state.forced_tokens() == []


def test_an_end_token_is_taken_once_and_can_be_taken_back():
    state = constraint(choice=["ab", "abc"]).start()
    end, other = sorted(shipped_tokenizer().eos_ids)
    assert not state.advance(end), "nothing is written yet"
    state.advance_many(ids("ab"))
    assert state.accepting and not state.stopped
    assert state.advance_many([end, other]) == 1
    assert state.stopped and state.accepting
    assert allowed(state) == [end, other], "after the end nothing else may come"
    assert state.forced_tokens() == [] and not state.advance(other)
    fork = state.fork()
    state.rollback(1)
    assert not state.stopped and fork.stopped
    assert state.advance_many(ids("c")) == 1
    assert state.stopped and allowed(state) == [end, other]
    assert state.advance(end)
    state.rollback(3)
    assert state.advance_many([*ids("abc"), other]) == len(ids("abc")) + 1


def test_a_refused_token_changes_nothing():
    state = constraint(regex="abc+").start()
    before = allowed(state)
    assert state.advance_many(ids("ab") + ids("zz")) == len(ids("ab"))
    assert state.error is None
    state.rollback(len(ids("ab")))
    assert allowed(state) == before


def test_ids_without_a_token_and_special_tokens_are_never_allowed():
    state = constraint(regex=r"(.|\n)*").start()
    tokenizer = shipped_tokenizer()
    assert max(allowed(state)) < tokenizer.vocab_size
    assert set(allowed(state)) & tokenizer.special_ids == tokenizer.eos_ids
    named = constraint(grammar="start: <|user|> /a+/").start()
    assert allowed(named) == [tokenizer.token_to_id("<|user|>")], "but where a grammar names one"


def test_many_masks_at_once_equal_those_one_by_one():
    states = [constraint(**wish).start() for wish in WISHES]
    states[3].advance_many([*ids("yes"), 2])
    out = np.full((7, -(-VOCAB // 32)), -1, np.int32)
    assert fill_masks(states, out) == [True] * 5
    for row, state in zip(out, states, strict=False):
        one = np.zeros_like(row)
        state.fill_mask(one)
        assert (row == one).all()
    assert (out[5:] == -1).all(), "rows without a state are left alone"
    with pytest.raises(ValueError, match="int32"):
        fill_masks(states, out.astype(np.int64))
    with pytest.raises(ValueError, match="contiguous"):
        states[0].fill_mask(out[0, ::2])


def test_states_of_one_constraint_do_not_touch_each_other():
    shared = constraint(json=PERSON)
    texts: dict[int, str | None] = {}
    alone = {seed: walk(shared, seed) for seed in range(4)}
    threads = [
        threading.Thread(target=lambda s=seed: texts.update({s: walk(shared, s)})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == alone


CHOICES = {" naïve café 你好", "b 🎉"}
WRITTEN = '{"ä b":[1,"x"]}'


def tiny(words: list[str]) -> Tokenizer:
    """A tokenizer whose tokens are some texts, as written, and an end token."""
    vocab = {word: i for i, word in enumerate([*words, "</s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=False))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


@pytest.mark.parametrize("pattern", ["(ab|ba)*", "a?b{1,3}a", "a(a|bb)*b?", "(a|ab)(b|ba)a*"])
def test_masks_equal_brute_force_on_a_tiny_vocabulary(pattern):
    words = ["a", "b", "c"]
    tokenizer = tiny(words)
    compiled = Compiler(tokenizer, 4, tokenizer.eos_ids).compile(StructuredOutputs(regex=pattern))
    texts = ["".join(t) for n in range(9) for t in itertools.product("abc", repeat=n)]
    whole = {t for t in texts if re.fullmatch(pattern, t)}
    beginnings = {t[:n] for t in whole for n in range(len(t) + 1)}
    seen = 0
    for text in (t for t in texts if len(t) <= 4 and t in beginnings):
        state = compiled.start()
        assert state.advance_many([words.index(c) for c in text]) == len(text)
        expected = {i for i, word in enumerate(words) if text + word in beginnings}
        assert set(allowed(state, 4)) == expected | ({3} if text in whole else set()), text
        seen += 1
    assert seen >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_writes_what_was_asked_for(kind):
    backend = KINDS[kind][0]()
    end = "</s>"
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": end})
    compiled = Compiler(tokenizer, tokenizer.vocab_size + 7, tokenizer.eos_ids)
    wishes = [
        (StructuredOutputs(choice=list(CHOICES)), CHOICES.__contains__),
        (StructuredOutputs(regex="[ab ]{3,9}"), re.compile("[ab ]{3,9}").fullmatch),
        (
            StructuredOutputs(grammar='start: "start" | " start " start'),
            re.compile("( start )*start").fullmatch,
        ),
        (StructuredOutputs(json={"enum": [{"ä b": [1, "x"]}]}, disable_any_whitespace=True), WRITTEN.__eq__),
    ]
    for seed, (wish, right) in enumerate(wishes):
        for turn in range(3):
            rng, state, tokens = random.Random(seed * 10 + turn), compiled.compile(wish).start(), []
            while not state.stopped:
                token = rng.choice(allowed(state, tokenizer.vocab_size + 7))
                assert state.advance(token)
                tokens.append(token)
            assert right(tokenizer.decode(tokens)), tokenizer.decode(tokens)


def test_a_model_without_an_end_token_is_refused():
    with pytest.raises(RequestError, match="eos_token_id"):
        Compiler(shipped_tokenizer(), 4096, frozenset()).compile(StructuredOutputs(json_object=True))


def test_importing_the_compiler_loads_neither_parser_nor_validator():
    code = (
        "import sys, trimtab.decoding.constraints.compiler as c;"
        "print([m for m in ('llguidance', 'jsonschema') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_equal_wishes_share_a_constraint_and_old_ones_leave():
    tokenizer = shipped_tokenizer()
    small = Compiler(tokenizer, 4096, tokenizer.eos_ids, cache_size=2)
    first = small.compile(StructuredOutputs(json={"type": "integer"}))
    assert small.compile(StructuredOutputs(json='{"type": "integer"}')) is first
    small.compile(StructuredOutputs(choice=["a"]))
    assert small.compile(StructuredOutputs(json={"type": "integer"})) is first
    small.compile(StructuredOutputs(choice=["b"]))
    small.compile(StructuredOutputs(choice=["c"]))
    assert small.compile(StructuredOutputs(json={"type": "integer"})) is not first
    assert compiler().compile(StructuredOutputs(grammar='start: "a"')).start().accepting is False
