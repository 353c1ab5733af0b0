"""The model gives the numbers of `transformers`, for every family and every rope scaling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab
from models.tiny_models import CASES, CachedAttend, greedy, make, oracle, texts

FP32 = 1e-5
# Over hundreds of tokens the worst logit drifts a little further, also between two orders of summation in
# our own code.
LONG = 5e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: make(case, root / name) for name, case in CASES.items()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Path, int]:
    return folders[request.param], CASES[request.param].length


def tolerance(length: int) -> float:
    return FP32 if length <= 64 else LONG


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the spread of the logits where that is above one."""
    return float((ours - theirs).abs().max() / theirs.std().clamp(min=1))


@torch.no_grad()
def test_logits(case: tuple[Path, int]) -> None:
    folder, length = case
    model = trimtab.load(folder)
    ids = texts(model, 2, length)
    ours, theirs = model(ids), oracle(folder)(ids).logits
    assert theirs.std() > 0.3, "a model whose logits are all alike proves nothing"
    assert difference(ours, theirs) < tolerance(length)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(case: tuple[Path, int], side: str) -> None:
    folder, length = case
    model = trimtab.load(folder)
    ids = texts(model, 3, length, seed=1)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, length - 4)):
        hidden = slice(0, padding) if side == "left" else slice(length - padding, length)
        mask[row, hidden] = 0
        ids[row, hidden] = 0
    ours, theirs = model(ids, mask), oracle(folder)(ids, attention_mask=mask).logits
    assert ours.isfinite().all()
    assert difference(ours[mask.bool()], theirs[mask.bool()]) < tolerance(length)
    whole = model(ids[:1], mask[:1])
    assert difference(ours[:1], whole) < tolerance(length), (
        "a text does not depend on what else is in the batch"
    )


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1000, 7])
def test_cached_decoding_and_chunked_prefill(case: tuple[Path, int], chunk: int) -> None:
    folder, length = case
    model = trimtab.load(folder)
    prompt = texts(model, 1, length - 10, seed=2)
    theirs = oracle(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    assert greedy(model, prompt[0].tolist(), 12, chunk) == theirs[0, prompt.shape[1] :].tolist()


@torch.no_grad()
def test_run_gives_the_hidden_states_of_the_plain_forward(case: tuple[Path, int]) -> None:
    folder, length = case
    model = trimtab.load(folder)
    ids = texts(model, 1, length, seed=3)
    attend = CachedAttend(model)
    pieces = [attend.feed(piece, length) for piece in ids[0].split(11)]
    assert difference(model.logits(torch.cat(pieces)), model(ids)[0]) < tolerance(length)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3", "mixtral", "qwen3moe"])
def test_half_precision_is_as_near_to_the_truth_as_transformers(
    folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    model = trimtab.load(folders[name], dtype=dtype)
    ids = texts(model, 4, 24, seed=4)
    ours, theirs = model(ids), oracle(folders[name], dtype)(ids).logits
    assert ours.dtype == dtype
    truth = oracle(folders[name])(ids).logits
    # The median: where two experts are all but equal, rounding may choose either, here as there.
    mine, other = ((x.float() - truth).abs().median() for x in (ours, theirs))
    assert 0 < mine < 1.5 * other


@torch.no_grad()
def test_a_changed_switch_changes_the_numbers(folders: dict[str, Path]) -> None:
    """The cases can tell their switches apart: with one ignored the parity tests would fail."""
    for plain, switched in (("mistral", "mistral-window"), ("llama", "llama-big-theta")):
        model = trimtab.load(folders[plain])
        ids = texts(model, 1, 48)
        other = trimtab.load(folders[switched])
        other.load_state_dict(model.state_dict())
        assert difference(other(ids), model(ids)) > 100 * FP32


def test_gradients_reach_every_parameter(folders: dict[str, Path]) -> None:
    for name in ("llama-mqa-tied", "qwen3-bias", "mixtral", "qwen3moe-mixed-layers"):
        model = trimtab.load(folders[name])
        ids = texts(model, 2, 40)
        torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # The bias of keys shifts all scores of a query alike, so its gradient may vanish.
        assert [n for n in without if not n.endswith("k_proj.bias")] == []
