"""A grown model computes what the small one did, and every new part can learn."""

from __future__ import annotations

import pytest
import torch

from training.tiny import CONFIG
from trimtab.errors import ConfigError
from trimtab.models.config import config_from_dict
from trimtab.models.shapes import random_model
from trimtab.training.starting.growing import grow

IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("layers", "units"), [(5, None), (None, 100), (3, 96), (2, 64)])
def test_the_logits_stay(tied, layers, units):
    small = random_model(config_from_dict(CONFIG | {"tie_word_embeddings": tied}))
    grown = grow(small, layers, units)
    assert grown.config.num_layers == (layers or 2)
    assert grown.config.intermediate_size == (units or 64)
    with torch.no_grad():
        torch.testing.assert_close(grown(IDS), small(IDS), rtol=1e-5, atol=1e-5)


def test_the_logits_stay_where_projections_have_biases():
    small = random_model(config_from_dict(CONFIG | {"attention_bias": True, "mlp_bias": True}))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        torch.testing.assert_close(grow(small, 3, 96)(IDS), small(IDS), rtol=1e-5, atol=1e-5)


def test_new_parts_get_a_gradient_after_one_step():
    grown = grow(random_model(config_from_dict(CONFIG)), 3, 96)
    grown.requires_grad_(True)
    for _ in range(2):
        grown(IDS).logsumexp(-1).sum().backward()
        with torch.no_grad():
            for parameter in grown.parameters():
                assert parameter.grad is not None
                parameter -= 1e-2 * parameter.grad
    still = [name for name, p in grown.named_parameters() if not p.grad.any()]
    assert still == []


def test_a_model_does_not_shrink():
    with pytest.raises(ConfigError, match=r"2 layers and 64 .*cannot grow to 1 and 64"):
        grow(random_model(config_from_dict(CONFIG)), layers=1)
