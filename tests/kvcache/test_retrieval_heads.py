"""What retrieval heads are known for: sparing these few from forgetting keeps what stands far behind."""

from __future__ import annotations

import functools

import pytest
import torch

import trimtab
from kvcache.policies import make_engine, small_model
from trimtab.attachment import Attachment, Attachments, Base
from trimtab.decoding.sampling_params import SamplingParams
from trimtab.errors import ConfigError, PlanError
from trimtab.evaluation.chat import question_ids
from trimtab.evaluation.corpus import shipped_text
from trimtab.evaluation.tasks.needle import Case, NeedleOptions, first_number, make_cases
from trimtab.models.transformer import Model

SMALL = "sinks=4,window=60"


@functools.cache
def shipped() -> Model:
    return trimtab.load(dtype="float32")


@functools.cache
def middle() -> list[Case]:
    """Needles that have left every window when the question comes."""
    assert shipped().tokenizer is not None
    options = NeedleOptions(lengths=(400,), depths=4, samples=3)
    cases = make_cases(shipped().tokenizer, shipped_text(), options, seed=5)  # type: ignore[arg-type]
    return [case for case in cases if case.depth < 0.9]


@functools.cache
def run(cache: str) -> tuple[float, float]:
    """Share of the needles found, and bytes held at the end of a text."""
    tokenizer = shipped().tokenizer
    assert tokenizer is not None
    engine = make_engine(cache, model=shipped(), kv_memory="64MiB", max_step_tokens=100)
    prompts = [question_ids(tokenizer, case.prose + case.question) for case in middle()]
    outs = engine.generate(prompts, SamplingParams(max_tokens=8, temperature=0))
    right = sum(first_number(o.text) == case.answer for o, case in zip(outs, middle(), strict=True))
    return right / len(outs), sum(o.metrics.kv_bytes_held for o in outs) / len(outs)


@functools.cache
def kv_heads() -> tuple[list[str], list[str]]:
    """KV heads of the shipped model whose score is at least a half, and all the others, as LAYER-HEAD."""
    scores = Attachments(shipped()).get("retrieval_heads").tensors["scores"]
    best = scores.unflatten(1, (shipped().config.num_kv_heads, -1)).amax(-1)
    names = {
        f"{layer}-{head}": best[layer, head] for layer in range(len(best)) for head in range(best.shape[1])
    }
    spared = [name for name, score in names.items() if score >= 0.5]
    return spared, [name for name in names if name not in spared]


def test_sparing_the_retrieval_heads_keeps_the_needles() -> None:
    """A few of all KV heads are enough; the others at several times the bytes do not help."""
    full, all_bytes = run("full")
    none, few_bytes = run(f"retrieval_heads:keep=0,{SMALL}")
    spared, spared_bytes = run(f"retrieval_heads:threshold=0.5,{SMALL}")
    few, others = kv_heads()
    share = len(few) / (len(few) + len(others))
    assert 0 < share <= 0.25, "few heads retrieve"
    assert full >= 0.85
    assert none <= full / 8
    assert spared >= full - 0.12
    assert spared_bytes == pytest.approx(few_bytes + (all_bytes - few_bytes) * share, rel=0.01)
    assert run(f"retrieval_heads:keep={share},{SMALL}") == (spared, spared_bytes), "the same heads"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["early", "late", "all"])
def test_sparing_other_heads_does_not(which: str) -> None:
    """Even more of them than there are retrieval heads, and even all of them."""
    few, others = kv_heads()
    more = len(few) + 2
    chosen = {"early": others[:more], "late": others[-more:], "all": others}[which]
    share, held = run(f"retrieval_heads:heads={'+'.join(chosen)},{SMALL}")
    assert share <= run("full")[0] / 8 and held > run(f"retrieval_heads:threshold=0.5,{SMALL}")[1]


def test_all_heads_streaming_are_streaming_at_positions_in_the_text() -> None:
    """The same rows by another road: streaming's ablation, whose window is the same for all heads."""
    tokens = question_ids(shipped().tokenizer, middle()[0].prose)  # type: ignore[arg-type]
    pair = (tokens[:200], tokens[200:240])
    [mine] = make_engine(f"retrieval_heads:keep=0,{SMALL}", model=shipped()).score([pair])
    [other] = make_engine(f"streaming:{SMALL},positions=logical", model=shipped()).score([pair])
    assert mine.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_pages_are_freed_while_the_prompt_is_read() -> None:
    """The peak is what is held and a chunk more, not the prompt."""
    engine = make_engine("retrieval_heads:keep=0,sinks=16,window=32", max_step_tokens=32)
    [out] = engine.generate([[5] * 500], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    token = 2 * 2 * 2 * 16 * 4  # two layers of two heads of K and V
    assert out.metrics.kv_bytes_peak <= (16 + 32 + 32 + 16) * token
    assert out.metrics.kv_bytes_held <= (16 + 32 + 16) * token


# --- which heads


def kept(options: str, tmp_path, scores: list[list[float]]) -> list[list[bool]]:
    model = small_model()
    attachment = Attachment("retrieval_heads", Base.of(model), {"scores": torch.tensor(scores)})
    where = attachment.save(tmp_path / "scores", overwrite=True)
    engine = make_engine(f"retrieval_heads:{options},attachment={where}")
    rows = engine.cache.rows  # type: ignore[attr-defined]
    return (rows._window == 0).tolist()


def test_a_kv_head_counts_with_the_best_of_its_query_heads(tmp_path) -> None:
    scores = [[0.0, 0.5, 0.3, 0.3], [0.2, 0.1, 0.0, 0.9]]
    assert kept("keep=0.25", tmp_path, scores) == [[False, False], [False, True]]
    assert kept("keep=0.5", tmp_path, scores) == [[True, False], [False, True]]
    assert kept("threshold=0.3", tmp_path, scores) == [[True, True], [False, True]]
    assert kept("threshold=0.95", tmp_path, scores) == [[False, False], [False, False]]
    assert kept("keep=0.01", tmp_path, scores) == [[False, False], [False, True]], "at least one"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("keep=1.5", "'keep' of retrieval_heads is 1.5; it must be from 0 to 1"),
        ("threshold=-1", "'threshold' of retrieval_heads is -1.0; it must be from 0 to 1"),
        ("sinks=-1", "'sinks' of retrieval_heads is -1"),
        ("window=0", "'window' of retrieval_heads is 0; it must be at least 1"),
        ("heads=3", "'heads' of retrieval_heads is .* LAYER-HEAD"),
        ("heads=0-1,threshold=0.5", "by 'threshold' or by 'heads'; give one"),
    ],
)
def test_options_that_cannot_be(options: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_engine(f"retrieval_heads:{options}")


def test_heads_that_are_not_there_and_scores_that_are_missing_or_of_another_model(tmp_path) -> None:
    with pytest.raises(PlanError, match="no KV head 0-2: the model has 2 layers of 2"):
        make_engine("retrieval_heads:heads=0-1+0-2")
    with pytest.raises(ConfigError, match="trimtab attach retrieval_heads"):
        make_engine("retrieval_heads")
    other = Attachment("retrieval_heads", Base.of(shipped()), {"scores": torch.zeros(2, 4)})
    with pytest.raises(ConfigError, match="was made for tiny"):
        make_engine(f"retrieval_heads:attachment={other.save(tmp_path / 'other')}")
    odd = Attachment("retrieval_heads", Base.of(small_model()), {"scores": torch.zeros(2, 2)})
    with pytest.raises(ConfigError, match=r"'scores' .* is float32 \[2, 2\], not float32 \[2, 4\]"):
        make_engine(f"retrieval_heads:attachment={odd.save(tmp_path / 'odd')}")
