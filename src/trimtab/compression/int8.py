"""Eight bits a weight: every row of a matrix as whole numbers from -127 to 127 and one factor.

`scale = largest |w| of the row / 127` and `code = round(w / scale)`, to nearest, ties to even; symmetric, so
that no zero point is needed. Only weights are coded: activations, norms, biases and routers stay as they are.
This is the weight half of

Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022, arXiv 2208.07339

("row-wise absmax quantization"), without its int8 activations. Nothing is calibrated. Deviation: the
embedding and the output head are coded as well, a tied pair once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.compression.base import WeightMethod
from trimtab.errors import ConfigError
from trimtab.models import lora
from trimtab.models.fingerprint import Fingerprint
from trimtab.models.memory import WeightMemory
from trimtab.models.moe import SparseMLP
from trimtab.models.quantized import QuantizedEmbedding, QuantizedLinear
from trimtab.models.transformer import Model
from trimtab.registry import WEIGHTS, Card, NoOptions

_BLOCK = 1 << 22  # weights that are float32 at the same time


@WEIGHTS.add(
    card=Card(
        title="Int8 weights",
        idea="Store each row of every matrix as 8-bit whole numbers and one factor: round(w / max|w| * 127).",
        exactness="Approximate: a weight moves by at most 1/254 of its row's largest. Activations, norms,"
        " biases and routers are not rounded. Batching and chunking change no bit, as with plain weights.",
        cost="One byte a weight and four a row: about half of bfloat16, a quarter of float32. The C++ kernels"
        " read the codes themselves; plain torch widens a matrix for each product, which saves memory and"
        " costs time.",
        needs="Nothing; no calibration. Adapters are folded in before.",
        avoid_when="Rows hold a few weights much larger than the rest, or the arithmetic is the bound (long"
        " prompts, large batches) and memory is not.",
        paper="Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, 2022"
        " (its weights)",
        arxiv="2208.07339",
        measured="Shipped model, float32 activations, 22,506 tokens of held-out text: perplexity 35.83, in"
        " float32 35.81 (+0.03%; its sibling `draft` +0.02%); 5.5 MB instead of 21.6.",
    )
)
class Int8(WeightMethod):
    @staticmethod
    @torch.no_grad()
    def convert(model: Model, options: NoOptions) -> Model:
        if model.weights == "int8":
            return model
        if lora.on(model):
            raise ConfigError(
                "weights=int8 cannot code a model whose adapters are not folded into its weights; fold them"
                " first, or load the adapter with the plan's adapter setting"
            )
        weights = dict(model.state_dict())
        with torch.device("meta"):
            copy = Model(model.config)
        names = _put_quantized(copy, model.dtype)
        matrices = [f"{name}.weight" for name in names]
        memory = None
        if model.device.type == "cpu":
            memory = WeightMemory([weights[matrix].numel() for matrix in matrices])
        for name, matrix in zip(names, matrices, strict=True):
            codes, scale = quantize(weights[matrix])
            if not scale.isfinite().all():
                raise ConfigError(f"weights=int8 cannot code {matrix!r}, which holds NaN or infinity")
            weights[matrix] = codes if memory is None else memory.hold(codes, torch.int8)
            weights[f"{name}.scale"] = scale
        copy.load_state_dict(weights, assign=True)
        copy.tokenizer, copy.path, copy.adapter = model.tokenizer, model.path, model.adapter
        copy.weights = "int8"
        # What was fitted for the model serves this one too, as it does in another dtype.
        copy._fingerprint = Fingerprint(fixed=model.fingerprint())
        return copy.eval()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and factors float32 [N] of a matrix [N, K]; a row with NaN or infinity has such a
    factor."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, _BLOCK // weight.shape[1])
    for part, to, factor in zip(weight.split(rows), codes.split(rows), scale.split(rows), strict=True):
        wide = part.float()
        factor.copy_(wide.abs().amax(1) / 127)
        wide = wide / torch.where(factor > 0, factor, 1.0)[:, None]
        # A factor below float32's normal numbers is itself rounded; its codes could leave the range.
        to.copy_(wide.round().nan_to_num(0).clamp(-127, 127))
    return codes, scale


def _put_quantized(model: Model, dtype: torch.dtype) -> list[str]:
    """Replace the modules whose matrix is coded, on the meta device; their names."""
    routers = {id(module.gate) for module in model.modules() if isinstance(module, SparseMLP)}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and id(module) not in routers
    ]
    with torch.device("meta"):
        for name, module in found:
            rows, width = module.weight.shape
            if isinstance(module, nn.Embedding):
                new: nn.Module = QuantizedEmbedding(rows, width, dtype)
            else:
                new = QuantizedLinear(width, rows, bias=module.bias is not None)
            model.set_submodule(name, new)
    return [name for name, _ in found]
