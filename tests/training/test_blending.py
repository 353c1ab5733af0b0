"""A blend is the weighted mean of two models, and starts a run as one."""

from __future__ import annotations

import pytest
import torch

from training.tiny import CONFIG
from trimtab.errors import ConfigError
from trimtab.models.checkpoint import load
from trimtab.models.config import config_from_dict
from trimtab.models.save import save
from trimtab.models.shapes import random_model
from trimtab.training.recipe import recipe_from_dict
from trimtab.training.setup import build_model
from trimtab.training.starting.blending import blend


def models():
    return (random_model(config_from_dict(CONFIG), seed=seed) for seed in (1, 2))


def test_every_parameter_is_the_weighted_mean():
    (one, other), (mine, theirs) = models(), models()
    found = dict(blend(one, other, 0.25).named_parameters())
    expected = {name: 0.75 * a + 0.25 * theirs.state_dict()[name] for name, a in mine.named_parameters()}
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(("share", "which"), [(0, 0), (1, 1)])
def test_the_ends_are_the_models_themselves(share, which):
    one, other = models()
    wanted = list(models())[which].state_dict()
    found = blend(one, other, share).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_recipe_starts_from_a_blend(tmp_path):
    shipped = load(dtype="float32")
    with torch.no_grad():
        shipped.model.norm.weight.mul_(3)
    save(shipped, tmp_path / "other")
    plain = {"output": "out", "mixture": [{"kind": "documents", "paths": ["a.txt"]}], "tokens": 10}
    source = {"source": "shipped", "blend": str(tmp_path / "other"), "blend_share": 0.5}
    model = build_model(recipe_from_dict(plain | {"model": source}))
    torch.testing.assert_close(model.model.norm.weight, 2 * load(dtype="float32").model.norm.weight)


def test_what_cannot_be_blended_is_named(tmp_path):
    one, other = models()
    wide = random_model(config_from_dict(CONFIG | {"intermediate_size": 96}))
    with pytest.raises(ConfigError, match=r"cannot be blended.*mlp.*another shape"):
        blend(one, wide, 0.5)
    other.tokenizer = load().tokenizer
    with pytest.raises(ConfigError, match="different tokenizers"):
        blend(one, other, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "shipped", "blend": "a", "blend_share": 2}, "'blend_share' of the model is 2"),
        ({"source": "shipped", "blend_share": 0.5}, "the share of 'blend', which is missing"),
        ({"config": CONFIG, "blend": "a"}, "needs a 'source' to be blended with"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    plain = {"output": "o", "mixture": [{"kind": "documents", "paths": ["a.txt"]}], "tokens": 10}
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(plain | {"model": settings})
