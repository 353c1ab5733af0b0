"""Adapters in PEFT's files: the same logits as PEFT itself, both ways, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from models.tiny_models import Tiny, make, oracle
from trimtab.errors import ConfigError, OutputError
from trimtab.models.lora import Adapters, add_lora, load_adapters, load_peft, on, save_peft
from trimtab.models.shapes import random_model, shape
from trimtab.models.transformer import Model

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


def randomize(module: torch.nn.Module) -> None:
    """Make every B matrix different from zero, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)


@pytest.fixture
def model() -> Model:
    return random_model(CONFIG, seed=1)


@pytest.fixture
def adapters(model: Model) -> Adapters:
    adapters = add_lora(model, rank=4, targets=("q_proj", "up_proj"))
    randomize(model)
    return adapters


@pytest.fixture
def folder(adapters: Adapters, tmp_path: Path) -> Path:
    return save_peft(adapters, tmp_path / "peft", base_model="some/model")


FAMILIES = {
    "llama": Tiny("Llama", dict(vocab_size=64)),
    "qwen2": Tiny("Qwen2", dict(vocab_size=64, tie_word_embeddings=True)),
    "mixtral": Tiny("Mixtral", dict(vocab_size=64, num_local_experts=3, num_experts_per_tok=2)),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_are_pefts_both_ways(family: str, rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = make(FAMILIES[family], tmp_path / "base")
    targets = ATTENTION if family == "mixtral" else "all-linear"
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(oracle(base), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs.eval()(TOKENS).logits
        without = oracle(base)(TOKENS).logits
        assert (wanted - without).abs().max() > 0.1

        model = trimtab.load(base)
        adapters = load_peft(model, tmp_path / "theirs")
        torch.testing.assert_close(model(TOKENS), wanted, atol=1e-5, rtol=1e-5)
        merged = trimtab.load(base, adapter=tmp_path / "theirs")
        torch.testing.assert_close(merged(TOKENS), wanted, atol=2e-5, rtol=1e-5)

        randomize(model)
        save_peft(adapters, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(oracle(base), tmp_path / "ours").eval()
        assert again.peft_config["default"].base_model_name_or_path == str(base)
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-5)
        first = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
        assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == first.keys()


def test_our_own_files_come_back(model: Model, adapters: Adapters, folder: Path) -> None:
    with torch.no_grad():
        wanted = model(TOKENS)
    adapters.remove()
    load_adapters(model, folder)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), wanted)


def test_only_a_folder_of_peft_is_replaced(adapters: Adapters, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_peft(adapters, folder)
    save_peft(adapters, folder, overwrite=True)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo").write_text("x")
    with pytest.raises(OutputError, match="not an adapter of PEFT, so it is not replaced"):
        save_peft(adapters, tmp_path / "holiday", overwrite=True)


def change(folder: Path, **entries: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def retensor(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors by name within `base_model.model.`; None takes one away."""
    file = folder / "adapter_model.safetensors"
    kept = load_file(file)
    for name, tensor in tensors.items():
        kept.pop(f"base_model.model.{name}", None)
        if tensor is not None:
            kept[f"base_model.model.{name}"] = tensor
    save_file(kept, file)


FIRST = "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: change(f, use_dora=True), "sets 'use_dora' to True, which trimtab does not support"),
        (lambda f: change(f, bias="all"), "sets 'bias' to 'all'"),
        (lambda f: change(f, lora_bias=True), "sets 'lora_bias'"),
        (lambda f: change(f, modules_to_save=["lm_head"]), r"sets 'modules_to_save' to \['lm_head'\]"),
        (lambda f: change(f, alpha_pattern={"q_proj": 3}), "sets 'alpha_pattern'"),
        (lambda f: change(f, rank_pattern={"q_proj": 3}), "sets 'rank_pattern'"),
        (lambda f: change(f, layers_to_transform=[0]), "sets 'layers_to_transform'"),
        (lambda f: change(f, target_parameters=["mlp.experts.gate_up_proj"]), "sets 'target_parameters'"),
        (lambda f: change(f, trainable_token_indices=[1]), "sets 'trainable_token_indices'"),
        (lambda f: change(f, fan_in_fan_out=True), "sets 'fan_in_fan_out'"),
        (lambda f: change(f, invented_in_2030=1), "sets 'invented_in_2030' to 1"),
        (lambda f: change(f, init_lora_weights="pissa"), "'pissa', which changes the base model's weights"),
        (lambda f: change(f, peft_type="IA3"), "of type 'IA3'; trimtab reads LORA"),
        (lambda f: change(f, r=5), r"of shape \[4, 32\]; this model and its rank call for \[5, 32\]"),
        (lambda f: change(f, lora_alpha="much"), "option 'alpha' of .* is 'much'"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"junk"), "is damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: retensor(f, **{FIRST: None}), "lacks 'model.layers.0.self_attn.q_proj.lora_A'"),
        (lambda f: retensor(f, **{FIRST: torch.full((4, 32), torch.nan)}), "not numbers"),
        (
            lambda f: retensor(f, **{"lm_head.lora_A.weight": torch.zeros(4, 32)}),
            "names 'lm_head', which this model cannot adapt",
        ),
        (
            lambda f: retensor(f, **{"lm_head.weight": torch.zeros(4, 32)}),
            "holds 'base_model.model.lm_head.weight', which is no part",
        ),
        (
            lambda f: retensor(f, **{"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}),
            "holds 'model.layers.9.self_attn.q_proj.lora_A', for which this model has no place",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    adapters: Adapters, model: Model, folder: Path, damage, says: str
) -> None:
    adapters.remove()
    damage(folder)
    with pytest.raises(ConfigError, match=says) as error:
        load_peft(model, folder)
    assert "\n" not in str(error.value) and not on(model)


def test_experts_are_not_written() -> None:
    changes = dict(model_type="mixtral", architectures=["MixtralForCausalLM"])
    from trimtab.models.config import config_from_dict

    config = config_from_dict(dict(CONFIG.raw) | changes | dict(num_local_experts=2, num_experts_per_tok=1))
    with pytest.raises(ConfigError, match="no common layout for experts"):
        save_peft(add_lora(random_model(config)), "never")
