"""Loading: every layout that is written, by memory map, and one clear sentence for what is broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from models.tiny_models import CASES, make, oracle, texts
from trimtab.errors import CheckpointError, ConfigError
from trimtab.models.hub import find_folder
from trimtab.models.save import save
from trimtab.models.shapes import random_model, shape


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(CASES["llama-mqa-tied"], tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "model")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        trimtab.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NORM = "model.norm.weight"


def test_loaded_model(llama: Path) -> None:
    model = trimtab.load(str(llama))
    assert model.path == llama and not model.training
    assert model.tokenizer is not None and not model.tokenizer.available
    stored = load_file(llama / "model.safetensors")
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(t.shape) for n, t in stored.items()
    }
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())


def test_the_shipped_model_is_the_default() -> None:
    model = trimtab.load()
    assert model.path == find_folder("tiny")
    stored = load_file(model.path / "model.safetensors")
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == sum(tensor.numel() for tensor in stored.values())
    assert model.tokenizer is not None and model.tokenizer.available
    assert model.config.eos_token_ids == (2, 6)


@torch.no_grad()
def test_the_shipped_model_matches_transformers() -> None:
    model = trimtab.load(dtype="float32")
    assert model.path is not None and model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode("Once upon a time there lived in the woods an old man.")])
    theirs = oracle(model.path)(ids).logits
    assert float((model(ids) - theirs).abs().max()) < 1e-4


def test_dtype_is_the_stored_one_unless_asked(folder: Path) -> None:
    assert trimtab.load(folder).dtype == torch.float32
    assert trimtab.load(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert trimtab.load(folder, dtype=torch.float16).dtype == torch.float16

    def halve_all_but_norms(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if "norm" in name else tensor.bfloat16()

    edit_weights(folder, halve_all_but_norms)
    model = trimtab.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unknown_dtype_and_device(llama: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int8'; it must be float32, bfloat16, float16"):
        trimtab.load(llama, dtype="int8")
    with pytest.raises(ConfigError, match="device is 'abacus'"):
        trimtab.load(llama, device="abacus")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3moe"])
def test_sharded(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = trimtab.load(tmp_path)
    ids = texts(model, 1, 20)
    torch.testing.assert_close(model(ids), oracle(tmp_path)(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "qwen3moe-mixed-layers"])
def test_experts_stacked_in_one_tensor(name: str, tmp_path: Path) -> None:
    make(CASES[name], tmp_path, save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(tmp_path / "model.safetensors"))
    for dtype in ("float32", "bfloat16"):
        model = trimtab.load(tmp_path, dtype=dtype)
        plain = trimtab.load(make(CASES[name], tmp_path / "plain"), dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model = trimtab.load(tmp_path)
    ids = texts(model, 1, 20)
    torch.testing.assert_close(model(ids), oracle(tmp_path)(ids).logits, rtol=0, atol=1e-5)


def test_stacked_experts_of_another_shape(tmp_path: Path) -> None:
    make(CASES["mixtral"], tmp_path, save_original_format=False)
    edit_config(tmp_path, intermediate_size=48)
    assert "experts.gate_up_proj' of shape [5, 112, 32]" in refused(tmp_path)


def test_derived_buffers_of_old_checkpoints_are_left_out(folder: Path) -> None:
    before = trimtab.load(folder).fingerprint()
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert trimtab.load(folder).fingerprint() == before


def test_a_stored_copy_of_a_tied_head_must_be_a_copy(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert trimtab.load(folder).lm_head is None
    edit_weights(folder, lambda t: t["lm_head.weight"].add_(1))
    assert "'lm_head.weight', which differs from the embedding" in refused(folder)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            trimtab.load(name)
    assert "has no config.json" in refused(tmp_path)
    file = tmp_path / "some.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        trimtab.load(file)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(folder)
    (folder / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is in a format that trimtab does not read" in refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file} is truncated or not a safetensors file" in refused(folder)


def test_missing_and_truncated_shard(tmp_path: Path) -> None:
    make(CASES["llama"], tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    assert f"{shards[1]} is truncated" in refused(tmp_path)
    shards[1].unlink()
    assert f"lacks the shard {shards[1].name}" in refused(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_broken_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is not an index of shards" in refused(folder)


def test_a_shard_outside_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "shards must lie beside the index" in refused(folder)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    make(CASES["llama"], tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name]}, second)
    message = refused(tmp_path)
    assert f"hold the tensor {name!r}" in message and str(first) in message and str(second) in message


def test_missing_unexpected_and_misshapen_tensors(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update(extra=torch.ones(1)))
    assert "holds 'extra', for which this LlamaForCausalLM has no place" in refused(folder)
    edit_weights(folder, lambda t: (t.pop("extra"), t.update({NORM: torch.ones(5)})))
    assert f"holds {NORM!r} of shape [5]; config.json calls for [32]" in refused(folder)
    edit_weights(folder, lambda t: t.pop(NORM))
    assert f"lack {NORM!r}" in refused(folder)


def test_config_that_asks_for_other_weights(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)
    assert "lack 'model.layers.3.self_attn.q_proj.weight' and 8 more tensors" in refused(folder)
    edit_config(folder, num_hidden_layers=2)
    assert "'model.layers.2." in refused(folder)
    edit_config(folder, num_hidden_layers=3, tie_word_embeddings=False)
    assert "lack 'lm_head.weight'" in refused(folder)


@pytest.mark.parametrize(
    ("dtype", "named"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")]
)
def test_unsupported_stored_dtype(folder: Path, dtype: torch.dtype, named: str) -> None:
    edit_weights(folder, lambda t: t.update({NORM: t[NORM].to(dtype)}))
    assert f"stores {NORM!r} as {named}" in refused(folder)


def test_tokenizer_of_another_model(folder: Path) -> None:
    shipped = trimtab.load().path
    assert shipped is not None
    shutil.copyfile(shipped / "tokenizer.json", folder / "tokenizer.json")
    assert "vocab" in refused(folder)


_MEASURE = """
import sys, torch, trimtab
def field(name):
    text = open("/proc/self/status").read()
    return int(text.split(name + ":")[1].split()[0]) * 1024
trimtab.load(sys.argv[1])
before = field("VmRSS")
model = trimtab.load(sys.argv[2], dtype=sys.argv[3])
loaded = field("VmHWM")
for parameter in model.parameters():
    parameter.flatten()[::512].sum()
print((loaded - before) / model.weight_bytes(), (field("VmHWM") - before) / model.weight_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize(("dtype", "on_loading"), [("bfloat16", 0.1), ("float32", 1.1)])
def test_peak_memory(llama: Path, tmp_path: Path, dtype: str, on_loading: float) -> None:
    config = shape("125m", num_hidden_layers=16, vocab_size=4096)
    big = save(random_model(config, "bfloat16"), tmp_path / "big", max_shard_bytes=100_000_000)
    script = [sys.executable, "-c", _MEASURE, str(llama), str(big), dtype]
    env = {"PYTHONPATH": str(Path(trimtab.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, capture_output=True, text=True, env=env, check=True)
    loaded, used = map(float, result.stdout.split())
    assert loaded < on_loading, "of the weights' bytes, before they are used"
    assert 0.9 < used < 1.1
