"""Adapters: the base untouched, merged and unmerged exactly, saved whole, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trimtab
from trimtab.attachment import FACTS
from trimtab.errors import ConfigError, OutputError, PlanError
from trimtab.models.config import config_from_dict
from trimtab.models.lora import Adapters, LoraSettings, add_lora, load_adapters, on, save_adapters
from trimtab.models.save import save
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model
from trimtab.training.starting.lora import apply, exporter

CONFIG = shape(
    "125m",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
)
TOKENS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Model:
    return random_model(CONFIG, seed=1)


def trained(model: Model, seed: int = 3, **settings) -> Adapters:
    """Adapters as training leaves them: both matrices different from zero."""
    adapters = add_lora(model, **{"rank": 4, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2, generator=generator)
    return adapters


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    return model(TOKENS)


def test_new_adapters_change_nothing_and_alone_are_trained(model: Model) -> None:
    before = logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapters = add_lora(model, rank=4)
    assert torch.equal(logits(model), before)
    assert len(adapters.layers) == 2 * 7
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters.named_parameters())
    assert weights.keys() == model.state_dict().keys() - adapters.named_parameters().keys()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B alone, since it is zero
        model(TOKENS).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in adapters.named_parameters().items() if p.detach().abs().max() > 0}
    assert moved == set(adapters.named_parameters())
    assert not torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_gradients_are_those_of_the_sum_of_the_weights(model: Model) -> None:
    adapters = trained(model)
    model(TOKENS).logsumexp(-1).sum().backward()
    found = {name: p.grad.clone() for name, p in adapters.named_parameters().items()}
    layers = dict(adapters.layers)
    model = adapters.fold()
    model(TOKENS).logsumexp(-1).sum().backward()
    for name, layer in layers.items():
        whole = model.get_submodule(name).weight.grad
        torch.testing.assert_close(
            found[f"{name}.lora_A"], layer.scale * layer.lora_B.T @ whole, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            found[f"{name}.lora_B"], layer.scale * whole @ layer.lora_A.T, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_and_unmerged_is_the_base_bit_for_bit(model: Model, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    adapters = trained(model)
    with_adapters = logits(model)
    assert not torch.equal(with_adapters, before)
    with adapters.disable():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), with_adapters)
    adapters.merge()
    adapters.merge()
    torch.testing.assert_close(
        logits(model), with_adapters, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-4
    )
    merged = logits(model)
    with pytest.raises(KeyError), adapters.disable():
        assert torch.equal(logits(model), before)
        raise KeyError
    assert torch.equal(logits(model), merged), "and all is as before after an error"
    adapters.unmerge()
    assert torch.equal(logits(model), with_adapters)
    assert not on(adapters.remove())
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, weights[n]) and p.requires_grad for n, p in model.named_parameters())


def test_folding_gives_an_ordinary_model_with_another_fingerprint(model: Model, tmp_path: Path) -> None:
    base = model.fingerprint()
    adapters = trained(model)
    on_model, with_adapters = model.fingerprint(), logits(model)
    folded = adapters.fold()
    assert folded is model and not on(model)
    assert model.state_dict().keys() == random_model(CONFIG).state_dict().keys()
    assert len({base, on_model, model.fingerprint()}) == 3
    torch.testing.assert_close(logits(model), with_adapters, atol=1e-5, rtol=1e-4)
    save(model, tmp_path / "model")


def test_a_small_update_changes_the_fingerprint_too(model: Model) -> None:
    base, adapters = model.fingerprint(), trained(model)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters().items():
            if name.endswith("lora_B"):
                parameter.mul_(1e-3)
    assert adapters.fold().fingerprint() != base


def test_saved_and_loaded_is_the_same(model: Model, tmp_path: Path) -> None:
    adapters = trained(model, rslora=True, targets=("q_proj", "down_proj"), dropout=0.1)
    folder = save_adapters(adapters, tmp_path / "adapter", made={"data": "notes.txt"})
    other = random_model(CONFIG, seed=1)
    loaded = load_adapters(other, folder)
    assert torch.equal(logits(other), logits(model))
    assert loaded.settings == adapters.settings
    facts = json.loads((folder / FACTS).read_text())
    assert facts["kind"] == "lora" and facts["made"]["data"] == "notes.txt"
    assert facts["base"]["fingerprint"] == random_model(CONFIG, seed=1).fingerprint()
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_adapters(adapters, folder)


def test_broken_adapters_are_not_written(model: Model, tmp_path: Path) -> None:
    adapters = trained(model)
    next(iter(adapters.layers.values())).lora_B.data[0, 0] = torch.nan
    with pytest.raises(OutputError, match="not numbers"):
        save_adapters(adapters, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_another_model_is_refused_and_left_alone(model: Model, tmp_path: Path) -> None:
    folder = save_adapters(trained(model), tmp_path / "adapter")
    other = random_model(CONFIG, seed=2)
    before = other.state_dict().keys()
    with pytest.raises(
        ConfigError, match=r"was trained for .*, and this model is .*; load that model, or train"
    ):
        load_adapters(other, folder)
    assert other.state_dict().keys() == before and all(p.requires_grad for p in other.parameters())


def test_a_folder_that_lacks_a_layer_is_refused(model: Model, tmp_path: Path) -> None:
    folder = save_adapters(trained(model, targets="q_proj"), tmp_path / "adapter")
    facts = json.loads((folder / FACTS).read_text())
    facts["options"]["targets"] = ["q_proj", "v_proj"]
    (folder / FACTS).write_text(json.dumps(facts))
    other = random_model(CONFIG, seed=1)
    with pytest.raises(ConfigError, match=r"lacks 'model.layers.0.self_attn.v_proj.lora_A'"):
        load_adapters(other, folder)
    assert not on(other)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "'rank' of the adapter is 0; it must be at least 1"),
        ({"alpha": 0.0}, "'alpha' of the adapter is 0.0; it must be more than 0"),
        ({"dropout": 1.0}, "'dropout' of the adapter is 1.0"),
        ({"targets": ()}, "'targets' of the adapter is empty"),
        ({"targets": "qproj"}, r"names 'qproj', which this model cannot adapt\. Did you mean 'q_proj'"),
        ({"targets": ("q_proj", "lm_head")}, "names 'lm_head', which this model cannot adapt"),
    ],
)
def test_mistakes_are_one_sentence(model: Model, settings, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        add_lora(model, **settings)
    assert not on(model)


def test_a_model_has_one_set_of_adapters(model: Model) -> None:
    add_lora(model)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(model)


def test_a_folder_that_is_no_adapter(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no adapter at"):
        load_adapters(model, tmp_path / "none")
    with pytest.raises(ConfigError, match="is not an adapter: it has neither"):
        load_adapters(model, tmp_path)


def test_dropout_is_of_training_alone(model: Model) -> None:
    trained(model, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_experts_are_adapted_and_their_router_is_not() -> None:
    raw = dict(CONFIG.raw) | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    model = random_model(config_from_dict(raw), seed=1)
    adapters = trained(model)
    assert {name.rpartition(".")[2] for name in adapters.layers} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
    }
    with_adapters = logits(model)
    adapters.fold()
    torch.testing.assert_close(logits(model), with_adapters, atol=1e-5, rtol=1e-4)


def test_an_engine_runs_adapters_that_are_still_on(model: Model) -> None:
    adapters = trained(model)
    params = trimtab.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompt = [TOKENS[0].tolist()]
    with_adapters = trimtab.Engine(model, backend="torch", threads=1).generate(prompt, params)[0].token_ids
    with pytest.raises(PlanError, match="adapters that are not folded"):
        trimtab.Engine(model, backend="native", threads=1)
    with adapters.disable():
        base = trimtab.Engine(model, backend="torch", threads=1).generate(prompt, params)[0].token_ids
    folded = trimtab.Engine(adapters.fold(), backend="torch", threads=1).generate(prompt, params)[0].token_ids
    assert with_adapters == folded != base


def test_a_plan_names_an_adapter(model: Model, tmp_path: Path) -> None:
    folder = str(save(model, tmp_path / "model"))
    adapters = trained(trimtab.load(folder))
    adapter = str(save_adapters(adapters, tmp_path / "adapter"))
    wanted = logits(adapters.fold())
    engine = trimtab.Engine(plan=trimtab.Plan(folder, adapter=adapter, backend="torch", threads=1))
    torch.testing.assert_close(logits(engine.model), wanted, atol=1e-6, rtol=1e-5)
    assert engine.model.fingerprint() != trimtab.load(folder).fingerprint()
    again = trimtab.Engine(engine.model, plan=engine.plan)
    assert again.model is engine.model
    with pytest.raises(
        ConfigError, match=r"the model handed in is loaded already; load it with trimtab\.load"
    ):
        trimtab.Engine(trimtab.load(folder), adapter=adapter)
    with pytest.raises(ConfigError, match="loaded already; give compare the model's folder"):
        trimtab.compare(trimtab.load(folder), ["full", f"full adapter={adapter}"], ["perplexity"])
    (tmp_path / "plan.yaml").write_text("model: model\nadapter: adapter\n")
    plan = trimtab.Plan.from_file(tmp_path / "plan.yaml")
    assert (plan.model, plan.adapter) == (folder, adapter)


def test_what_a_recipe_says(model: Model) -> None:
    adapters = apply(model, {"rank": 2, "targets": ["q_proj"]})
    assert adapters.settings == LoraSettings(rank=2, targets=("q_proj",)) and adapters.settings.scale == 2
    adapters.remove()
    with pytest.raises(
        ConfigError, match=r"unknown option 'ranks' of 'lora' in the recipe\. Did you mean 'rank'"
    ):
        apply(model, {"ranks": 2})


def test_what_a_run_leaves(model: Model, tmp_path: Path) -> None:
    adapters = trained(model)
    wanted = logits(model)
    exporter(adapters, "float32", {"recipe": "lora.yaml"})(model, tmp_path / "model")
    torch.testing.assert_close(logits(trimtab.load(tmp_path / "model")), wanted, atol=1e-5, rtol=1e-4)
    base = random_model(CONFIG, seed=1)
    load_adapters(base, tmp_path / "adapter")
    assert torch.equal(logits(base), wanted)
    assert {f.name for f in tmp_path.iterdir()} == {"model", "adapter"}
