"""From a model folder or a hub name to a `Model`, checked so that nothing is quietly wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from trimtab.errors import CheckpointError, ConfigError
from trimtab.models.config import ModelConfig, config_from_folder
from trimtab.models.hub import find_folder
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.transformer import Model
from trimtab.models.weights import Stored, list_tensors, read_tensors, same_values
from trimtab.plan import MethodChoice
from trimtab.registry import WEIGHTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Buffers that old checkpoints carry; they follow from the config.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(
    path_or_id: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    adapter: str | Path | None = None,
    weights: str = "plain",
) -> Model:
    """Load a model in Hugging Face format, in evaluation mode.

    `path_or_id` is a folder, a hub id such as `Qwen/Qwen3-0.6B`, or the name of a small model that ships
    with trimtab; None is the default one, `tiny`. `dtype` is float32, bfloat16 or float16; None takes the
    stored one, in which case (on the CPU) the parameters are views of the files. `revision` is a branch, tag
    or commit on the hub.
    `adapter` is the folder of a LoRA adapter, trimtab's or PEFT's, which is merged into the weights.
    `weights` says how its matrices are stored, as in a plan: `plain`, or a method such as `int8`.

    Raises CheckpointError, naming file and tensor or key, for anything missing, broken or unsupported,
    and ConfigError for an unknown dtype or device, or an adapter that does not fit.
    """
    wanted, where = parse_dtype(dtype), parse_device(device)
    folder = find_folder(path_or_id, revision)
    config = config_from_folder(folder)
    with torch.device("meta"):
        model = Model(config)
    stored = _match(list_tensors(folder), model, folder)
    tensors = read_tensors(stored, wanted or _prevailing(stored), where)
    model.load_state_dict(tensors, assign=True)
    model.path = folder
    model.tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
    model.eval()
    if adapter is not None:
        from trimtab.models.lora.files import load_adapters

        load_adapters(model, adapter).fold()
        model.adapter = str(adapter)
    choice = MethodChoice.parse(weights, WEIGHTS)
    return WEIGHTS.get(choice.name).cls.convert(model, choice.options)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A supported torch dtype from its name; None stays None."""
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if str(dtype) not in DTYPES:
        raise ConfigError(
            f"dtype is {str(dtype)!r}; it must be {', '.join(DTYPES)}, or None for the stored one"
        )
    return DTYPES[str(dtype)]


def parse_device(device: str | torch.device) -> torch.device:
    """A device that really works here."""
    try:
        found = torch.device(device)
        # A device that exists by name only shows itself when something is put on it.
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device is {str(device)!r}, which cannot be used here ({reason}); try 'cpu'"
        ) from None
    return found


def _prevailing(stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype that most of the bytes have; a model computes in one dtype."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _match(found: dict[str, Stored], model: Model, folder: Path) -> dict[str, Stored]:
    """The stored tensor of each parameter; raises for what is missing, left over or of another shape."""
    config = model.config
    found = {name: tensor for name, tensor in found.items() if not _DERIVED.search(name)}
    if config.moe is not None:
        found = _split_experts(found, config)
    if config.tie_word_embeddings and _HEAD in found and _EMBEDDING in found:
        head = found.pop(_HEAD)
        if head.shape != found[_EMBEDDING].shape or not same_values(head, found[_EMBEDDING]):
            raise CheckpointError(
                f"{head.file} holds {_HEAD!r}, which differs from the embedding, although config.json sets "
                "'tie_word_embeddings' to true; set it to false to use both"
            )
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"the weights in {folder} lack {_some(missing)}, which config.json calls for")
    extra = [name for name in found if name not in expected]
    if extra:
        raise CheckpointError(
            f"{found[extra[0]].file} holds {_some(extra)}, for which this {config.architecture} has no place"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{found[name].file} holds {name!r} of shape {list(found[name].shape)}; "
                f"config.json calls for {list(shape)}"
            )
    return {name: found[name] for name in expected}


def _split_experts(found: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """Accept experts stacked in one tensor a layer, as `transformers` holds them in memory."""
    assert config.moe is not None
    moe = config.moe
    stacked = re.compile(r"^(model\.layers\.\d+)\.mlp\.(gate\.weight|experts\.(?:gate_up_proj|down_proj))$")
    result: dict[str, Stored] = {}
    for name, whole in found.items():
        match = stacked.match(name)
        if match is None:
            result[name] = whole
            continue
        prefix, kind = f"{match[1]}.{moe.block_name}", match[2]
        if kind == "gate.weight":
            result[f"{prefix}.gate.weight"] = whole
            continue
        rows = config.hidden_size if kind.endswith("down_proj") else moe.intermediate_size
        names = [moe.down_name] if kind.endswith("down_proj") else [moe.gate_name, moe.up_name]
        if len(whole.shape) != 3 or whole.shape[:2] != (moe.num_experts, rows * len(names)):
            raise CheckpointError(
                f"{whole.file} holds {name!r} of shape {list(whole.shape)}; config.json calls for "
                f"[{moe.num_experts}, {rows * len(names)}, ...]"
            )
        for expert in range(moe.num_experts):
            for i, part in enumerate(names):
                result[f"{prefix}.experts.{expert}.{part}.weight"] = Stored(
                    whole.file,
                    whole.name,
                    (rows, whole.shape[2]),
                    whole.dtype,
                    part=(expert, i * rows, (i + 1) * rows),
                )
    return result


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
