"""The figures of a model's card, against the engine's own scores."""

from __future__ import annotations

import functools
import importlib
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trimtab
from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import shipped_text
from trimtab.models.transformer import Model

BOOKS = [shipped_text()[1000:1900], "Naïve – a text with “more” bytes than characters."]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "dev"))
    return importlib.import_module("measure_models")


@functools.cache
def draft() -> Model:
    return trimtab.load("draft", dtype="float32")


def test_every_token_of_a_book_is_in_one_window(measure: Any) -> None:
    tokenizer = draft().tokenizer
    assert tokenizer is not None
    small = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(context_length=16))
    found = [window.tolist() for window in measure.windows(small, BOOKS[0])]
    assert [token for window in found for token in window[1:]] == tokenizer.encode(
        BOOKS[0], add_special_tokens=False
    )
    assert all(window[0] == tokenizer.bos_id and 1 < len(window) <= 16 for window in found)


def test_bits_per_byte_are_the_engines(measure: Any) -> None:
    found = measure.book_figures(draft(), BOOKS)
    texts = [[window.tolist() for window in measure.windows(draft(), book)] for book in BOOKS]
    pairs = [(window[:1], window[1:]) for windows in texts for window in windows]
    scored = trimtab.Engine(draft(), backend="torch").score(pairs)
    total = -math.fsum(logprob for score in scored for logprob in score.logprobs)
    size = sum(len(book.encode()) for book in BOOKS)
    assert found["bytes"] == size > sum(map(len, BOOKS))
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(total / found["tokens"]), rel=1e-4)


def test_a_model_guesses_itself_best(measure: Any) -> None:
    itself = measure.guess_figures(draft(), draft(), BOOKS)
    assert itself["agreement"] == 1 and itself["acceptance"] == pytest.approx(1, abs=1e-5)
    other = measure.guess_figures(draft(), trimtab.load(dtype="float32"), BOOKS)
    assert 0.2 < other["agreement"] < 0.9 and 0.2 < other["acceptance"] < 0.9


@pytest.mark.slow
def test_a_report_has_every_figure_under_the_models_fingerprint(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "held_out_books", lambda characters: BOOKS)
    report = measure.measure(Namespace(models=["draft", "tiny"], target="tiny", samples=1, characters=None))
    first, second = report["models"].values()
    assert list(report["models"]) == [draft().fingerprint(), trimtab.load().fingerprint()]
    assert set(first["skills"]) == set(second["skills"]) >= {"passkey", "json", "arithmetic"}
    assert list(first["passkeys"]) == ["300", "1000", "1900"]
    assert "guesses" in first and "guesses" not in second


def test_mistakes(measure: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BOOKS", raising=False)
    with pytest.raises(ConfigError, match="BOOKS is not set"):
        measure.held_out_books()
    monkeypatch.setenv("BOOKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no valid\.jsonl\.zst"):
        measure.held_out_books()
