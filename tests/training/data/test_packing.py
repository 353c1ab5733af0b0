"""A packed text gets the numbers it would get alone: logits, loss and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.tiny import VOCAB, tiny_model
from trimtab.models.checkpoint import load
from trimtab.models.packed import PackedAttend
from trimtab.training.data.batch import pack, split
from trimtab.training.data.segments import Segment
from trimtab.training.objectives.lm import LanguageModelling

SHIPPED = Path(__file__).parents[3] / "../shared/models/base"


def segments(lengths, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return [Segment(rng.integers(3, vocab, n), rng.random(n) < 0.7) for n in lengths]


def logits(model, batch):
    attend = PackedAttend(model.config, model.rotary, batch.lengths)
    return model.logits(model.run(batch.tokens, attend.positions, attend))


def loss_and_gradients(model, batches):
    model.zero_grad()
    objective = LanguageModelling()
    total = sum((objective.loss_sum(model, batch) for batch in batches), torch.zeros(()))
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def check_packing(model, lengths):
    parts = segments(lengths, model.config.vocab_size)
    packed, alone = pack(parts), [pack([s]) for s in parts]
    with torch.no_grad():
        separate = torch.cat([model(b.tokens[None])[0] for b in alone])  # the plain causal forward
        size = max(1.0, separate.abs().max().item())
        torch.testing.assert_close(logits(model, packed), separate, rtol=0, atol=1e-5 * size)
    loss, gradients = loss_and_gradients(model, [packed])
    expected, wanted = loss_and_gradients(model, alone)
    units = packed.trained_tokens
    assert units == sum(b.trained_tokens for b in alone)
    assert abs(loss - expected) / units < 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient / units, wanted[name] / units, rtol=0, atol=1e-5)
    return packed, parts


def test_packed_is_the_same_as_alone():
    model = tiny_model()
    check_packing(model, (5, 1, 17, 30, 2))


def test_a_change_in_one_segment_moves_no_other():
    model = tiny_model()
    parts = segments((9, 12, 7), VOCAB)
    changed = [parts[0], Segment((parts[1].tokens + 1) % VOCAB, parts[1].trained), parts[2]]
    with torch.no_grad():
        before, after = logits(model, pack(parts)), logits(model, pack(changed))
    assert torch.equal(before[:9], after[:9]) and torch.equal(before[21:], after[21:])
    assert not torch.allclose(before[9:21], after[9:21])


def test_targets_stop_at_the_end_of_a_segment_and_first_tokens_are_never_predicted():
    batch = pack(
        [Segment(np.array([4, 5, 6]), np.ones(3, bool)), Segment(np.array([7, 8]), np.array([True, False]))]
    )
    assert batch.tokens.tolist() == [4, 5, 6, 7, 8] and batch.lengths == (3, 2)
    assert batch.targets.tolist() == [5, 6, 0, 8, 0] and batch.weights.tolist() == [1, 1, 0, 0, 0]
    assert batch.labels is None


def test_labels_of_classified_texts():
    texts = [Segment(np.arange(3), np.ones(3, bool), label) for label in (2, 0)]
    assert pack(texts).labels.tolist() == [2, 0]  # type: ignore[union-attr]


def test_groups_of_segments_keep_their_order_and_their_limit():
    parts = segments((5, 5, 3, 20, 4), VOCAB)
    groups = split(parts, 10)
    assert [[len(s) for s in g] for g in groups] == [[5, 5], [3], [20], [4]]
    assert [s for g in groups for s in g] == parts and split([], 10) == []


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shared models are not here")
def test_a_real_model_packed_is_the_same_as_alone():
    model = load(SHIPPED, dtype="float32").train()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    check_packing(model, (40, 3, 128, 1, 77))
