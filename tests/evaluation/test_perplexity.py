import itertools
import math
import random
from pathlib import Path

import pytest

from evaluation.fakes import ScriptedEngine, shipped_tokenizer
from trimtab.errors import ConfigError
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.tasks.base import TaskContext
from trimtab.evaluation.tasks.perplexity import Perplexity, PerplexityOptions, cut_windows
from trimtab.registry import TASKS

WIKITEXT = Path(__file__).parents[2] / "../shared/data"


def run(engine, **options):
    return Perplexity(PerplexityOptions(**options)).run(engine, TaskContext())


def test_windows_are_the_text_and_never_score_a_token_twice():
    text = shipped_text()[:20_000]
    options = PerplexityOptions(context=32, stride=16, windows=None)
    tokenizer = shipped_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = cut_windows(tokenizer, text, options)
    scored = [t for w in windows for t in w.scored]
    assert scored == ids[31 : 31 + len(scored)]
    assert len(ids) - 31 - len(scored) < 16 + 8
    for window in windows:
        assert window.context[0] == tokenizer.bos_id
        assert len(window.context) == 32 and len(window.scored) == 16


def test_scored_bytes_add_up_exactly_and_no_character_is_cut():
    rng = random.Random(0)
    text = "".join(rng.choice("aé€😀語 \n") for _ in range(3_000))
    tokenizer = shipped_tokenizer()
    windows = cut_windows(tokenizer, text, PerplexityOptions(context=16, stride=7, windows=None))
    scored = [t for w in windows for t in w.scored]
    decoded = tokenizer.decode(scored)
    assert "\ufffd" not in decoded and decoded in text
    assert sum(w.scored_bytes for w in windows) == len(decoded.encode())


def test_few_windows_are_spread_over_the_whole_text():
    text = shipped_text()
    windows = cut_windows(shipped_tokenizer(), text, PerplexityOptions(context=32, stride=16, windows=10))
    places = [text.index(shipped_tokenizer().decode(w.scored)) / len(text) for w in windows]
    assert places == sorted(places)
    assert all(0.05 < b - a < 0.15 for a, b in itertools.pairwise(places))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    result = run(ScriptedEngine(), context=32, stride=16, windows=5)
    metrics = result.metrics
    assert metrics["perplexity"].value == pytest.approx(4096)
    assert metrics["perplexity"].stderr == pytest.approx(0, abs=1e-6)
    assert metrics["tokens"].value == 80
    windows = cut_windows(
        shipped_tokenizer(), shipped_text(), PerplexityOptions(context=32, stride=16, windows=5)
    )
    size = sum(w.scored_bytes for w in windows)
    assert metrics["bits_per_byte"].value == pytest.approx(12 * 80 / size)


def test_bytes_per_number_come_from_what_the_engine_metered():
    metrics = run(ScriptedEngine(), context=32, stride=16, windows=5).metrics
    assert metrics["kv_bytes_held"].value == 10 * 48
    assert metrics["kv_bits"].value == pytest.approx(8 * 10 / (2 * 2 * 1 * 8))


def test_standard_error_and_paired_change():
    def noisy(shift):
        def judge(context, tokens):
            loss = 1 + (context[5] % 7) / 10 + shift
            return [-loss] * len(tokens), [False] * len(tokens)

        return ScriptedEngine(judge=judge)

    options = {"context": 32, "stride": 16, "windows": 20}
    reference, worse = run(noisy(0.0), **options), run(noisy(0.1), **options)
    assert reference.metrics["loss"].stderr > 0.01
    change = Perplexity(PerplexityOptions()).relate(worse, reference)["perplexity_change"]
    expected = reference.metrics["perplexity"].value * (math.exp(0.1) - 1)
    assert change.value == pytest.approx(expected)
    assert change.stderr == pytest.approx(0, abs=1e-6)  # the same shift in every window: nothing is uncertain


def test_a_broken_cache_gives_a_huge_number_and_no_overflow():
    engine = ScriptedEngine(judge=lambda _, tokens: ([-1e4] * len(tokens), [False] * len(tokens)))
    assert run(engine, context=32, stride=16, windows=2).metrics["perplexity"].value > 1e300


def test_progress_reaches_one_and_batches_are_as_large_as_the_plan_says():
    told = []
    engine = ScriptedEngine(max_batch=4)
    Perplexity(PerplexityOptions(context=32, stride=16, windows=10)).run(engine, TaskContext(0, told.append))
    assert [len(pairs) for pairs in engine.calls] == [4, 4, 2]
    assert told == pytest.approx([0.4, 0.8, 1.0])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context": 2000, "stride": 100}, "make context smaller"),
        ({"context": 0}, "'context' of task 'perplexity' is 0"),
        ({"windows": 0}, "'windows' of task 'perplexity' is 0"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        run(ScriptedEngine(), **options)


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ConfigError, match="has only"):
        run(ScriptedEngine(), text=str(tmp_path / "short.txt"))


def test_options_are_read_from_a_task_string():
    assert TASKS.build_options("perplexity", {"windows": "none", "context": "64"}).windows is None


def test_wikitext_is_found_in_a_folder():
    if not (WIKITEXT / "wikitext-2").is_dir():
        pytest.skip("no ../shared/data/wikitext-2")
    result = run(ScriptedEngine(), text="wikitext2", folder=str(WIKITEXT), context=64, stride=32, windows=3)
    assert result.metrics["tokens"].value == 96


def test_full_cache_gives_the_loss_of_transformers():
    """The whole chain (windows, engine, scoring) against one plain forward pass of another implementation."""
    transformers = pytest.importorskip("transformers")
    import torch

    import trimtab
    from trimtab.models.hub import find_folder

    options = PerplexityOptions(context=96, stride=32, windows=3)
    engine = trimtab.Engine(None, dtype="float32", max_batch=4, backend="torch")
    found = Perplexity(options).run(engine, TaskContext())
    oracle = transformers.AutoModelForCausalLM.from_pretrained(find_folder(None), dtype=torch.float32)
    losses = []
    for window in cut_windows(shipped_tokenizer(), shipped_text(), options):
        ids = torch.tensor([window.context + window.scored])
        with torch.no_grad():
            logprobs = oracle(ids).logits[0].log_softmax(-1)
        predicted = logprobs[len(window.context) - 1 : -1]
        losses.append(-predicted.gather(1, ids[0, len(window.context) :, None]).mean().item())
    assert found.detail["window_losses"] == pytest.approx(losses, abs=2e-5)
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
