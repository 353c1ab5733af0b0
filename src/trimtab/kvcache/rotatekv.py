"""RotateKV: keys and values rotated before they are coded, so that 2 bits a number are enough.

Su et al., RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive
Rotations, 2025, arXiv 2501.16383.

A few channels of the keys are far larger than the others and would make every scale coarse. A Hadamard
transform across the channels of `heads` neighbouring KV heads spreads them over all channels; then channels
are sorted by the sum of their rotated keys over calibration texts (an attachment), so that the `group_size`
channels that share a scale and a zero are alike. Keys are stored before rotary embedding, which would mix
channels again. Values are rotated head by head. Codes are min-max per token, both ends times `clip`. Tokens
behind the largest activations of a layer's input (attention sinks) stay in full in that layer.

As published, with these liberties: `heads` is lowered to what divides the number of KV heads, and a product
of heads and head size that is no power of two is rotated in blocks of its largest power of two; the scale is
range / (2^bits - 1) at every width (the release has bits^2 - 1, wrong for 3); the zero point, a whole
number, is stored as the number it stands for, so that it cannot overflow. Sinks are looked for in the prompt
alone, as released. Rotations run when rows are written and read; with `fold` they are part of the weights,
as published, which rounds 16-bit weights anew and takes a copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.attachment import Attachments
from trimtab.errors import ConfigError
from trimtab.kernels.affine import AffineCodec
from trimtab.kernels.paged import PAGE
from trimtab.kvcache.base import KVShape, Sequence, StepRows
from trimtab.kvcache.paging.per_layer import PerLayerCache, PerLayerRows, PerLayerSequence
from trimtab.registry import KV_CACHES, Card

if TYPE_CHECKING:
    from trimtab.models.config import ModelConfig
    from trimtab.models.transformer import Model
    from trimtab.plan import Plan


@dataclass(frozen=True, slots=True)
class RotateKVOptions:
    bits: Literal[2, 3, 4, 16] = field(
        default=2, metadata={"help": "bits a number; 16 = keep all in full", "label": True}
    )
    group_size: int = field(default=128, metadata={"help": "channels of a token that share scale and zero"})
    heads: int = field(default=4, metadata={"help": "KV heads whose keys are rotated together"})
    clip: float | None = field(
        default=None, metadata={"help": "factor on both ends of a group; none = 0.8 at 2 bits, else 1"}
    )
    sinks: int = field(
        default=20, metadata={"help": "largest activations a layer whose tokens stay in full; 0 = none"}
    )
    reorder: bool = field(default=True, metadata={"help": "sort channels as calibrated (an attachment)"})
    attachment: str = field(default="auto", metadata={"help": "its folder; auto = beside the model"})
    fold: bool = field(default=False, metadata={"help": "rotate the weights instead of keys and values"})
    rotation: bool = field(default=True, metadata={"help": "false: no rotation (ablation)"})
    pre_rope: bool = field(default=True, metadata={"help": "false: keys after rotary embedding (ablation)"})

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"option {name!r} of rotatekv is {getattr(self, name)}; it must be at least {least}"
                )
        if self.group_size < PAGE or self.group_size % PAGE:
            raise ConfigError(
                f"option 'group_size' of rotatekv is {self.group_size}; it must be a multiple of {PAGE}"
            )
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ConfigError(f"option 'clip' of rotatekv is {self.clip}; it must be above 0 and at most 1")
        if not (self.pre_rope and self.rotation):
            off = "rotation=false" if not self.rotation else "pre_rope=false"
            for name in ("fold", "reorder"):  # the order is calibrated on what it is used for
                if getattr(self, name):
                    raise ConfigError(f"rotatekv with {off} is for comparison; give {name}=false with it")

    def blocks(self, config: ModelConfig | KVShape) -> tuple[int, int]:
        """How many channels of keys, and of values, are transformed together."""
        if self.bits == 16 or not self.rotation:
            return 1, 1
        return key_block(config.num_kv_heads, config.head_dim, self.heads), _power_of_two(config.head_dim)

    def order(self, attachments: Attachments) -> Tensor | None:
        """The calibrated channel order int64 [layers, G * d], or None without one."""
        if self.bits == 16 or not self.reorder:
            return None
        config = attachments.model.config
        try:
            found = attachments.get("rotatekv", self.attachment)
            shape = (config.num_layers, config.num_kv_heads * config.head_dim)
            order = found.tensor("order", shape, torch.int64)
        except ConfigError as error:
            raise ConfigError(f"{error}; or choose rotatekv:reorder=false") from None
        if not torch.equal(order.sort(1).values, torch.arange(shape[1]).expand(shape)):
            raise ConfigError(f"'order' of the attachment {found.path} is not an order; make it again")
        made_for = key_block(config.num_kv_heads, config.head_dim, int(found.options.get("heads", 4)))
        if made_for != self.blocks(config)[0]:
            raise ConfigError(
                f"the attachment {found.path} is for rotations of {made_for} channels and option 'heads' of "
                f"rotatekv makes them {self.blocks(config)[0]}; give heads={found.options.get('heads', 4)}"
            )
        return order


def key_block(num_kv_heads: int, head_dim: int, heads: int) -> int:
    """Channels transformed together: of at most `heads` KV heads, as many as divide their number."""
    together = max(m for m in range(1, heads + 1) if num_kv_heads % m == 0)
    return _power_of_two(together * head_dim)


def _power_of_two(n: int) -> int:
    """The largest one that divides n."""
    return n & -n


@KV_CACHES.add(
    options=RotateKVOptions,
    card=Card(
        title="RotateKV",
        idea="Rotate keys and values so that no channel stands out, then code each token in 2 bits.",
        exactness="As published, but rotations run at writing and reading unless fold=true; lossy, bits=16 "
        "is lossless. With two 16-bit constants for 128 channels, 2 bits are 2.25 effective bits.",
        cost="(bits + 32 / group_size) / 16 of the bytes, and up to `sinks` tokens a layer in full; the "
        "prompt is held in full until its end; every key is rotated back and turned at every step.",
        needs="group_size divides KV heads x head size; a channel order (`trimtab attach rotatekv`) unless "
        "reorder=false; a model without a sliding window of its own.",
        avoid_when="Speed matters more than memory, or rows are to be dropped head by head as well.",
        paper="Su et al., RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via "
        "Outlier-Aware Adaptive Rotations, 2025",
        arxiv="2501.16383",
        measured="Shipped model, bf16, 2 cores of an AMD EPYC (AVX2), texts of 2,048 tokens: 2 bits, "
        "groups of 128: 972 KiB held (full 6.0 MiB), perplexity +21%, needle 30% (40%), 0.45x the"
        " speed of full.",
    ),
)
class RotateKV(PerLayerCache):
    options: RotateKVOptions

    @staticmethod
    def problems(options: RotateKVOptions, plan: Plan, config: ModelConfig) -> list[str]:
        found = RotateKV.model_problems(config)
        width = config.num_kv_heads * config.head_dim
        if options.bits < 16 and width % options.group_size:
            found.append(
                f"group_size {options.group_size} does not divide the {width} channels of the model's "
                f"{config.num_kv_heads} KV heads; give group_size={min(width, _power_of_two(width))}"
            )
        return found

    @classmethod
    def prepare(cls, model: Model, options: RotateKVOptions) -> Model:
        if not options.fold or options.bits == 16:
            return model
        from trimtab.models.folding import fold_rotation

        return fold_rotation(model, *options.blocks(model.config), options.order(Attachments(model)))

    def make_rows(self, memory_bytes: int) -> PerLayerRows:
        o, s = self.options, self.shape
        width, coded = s.num_kv_heads * s.head_dim, o.bits < 16
        key, self._value_block = o.blocks(s)
        if o.fold:
            self._value_block = 1
        order = o.order(s.attachments)
        clip = o.clip if o.clip is not None else 0.8 if o.bits == 2 else 1.0
        self._sinks = o.sinks if coded else 0
        self.wants_layer_input = self._sinks > 0
        self._places = 1 << max(0, self._sinks - 1).bit_length()  # keeps slabs small
        return PerLayerRows(
            s,
            memory_bytes,
            AffineCodec(o.bits, width, o.group_size, clip) if coded else None,
            kept_most=self._sinks,
            notes_bytes=s.num_layers * 2 * self._places * 4 if self._sinks else 0,
            rope_on_read=o.pre_rope,
            order=None if order is None else order.to(s.device, torch.int32).contiguous(),
            hadamard=key,
            folded=o.fold and coded and not s.attachments.model.config.qk_norm,
        )

    def reserve(self, sequence: Sequence, count: int) -> bool:
        end, prompt = sequence.length + count, sequence.prompt_length
        noting = self.wants_layer_input and sequence.length < prompt
        return self.rows.reserve(sequence.slot, end, coding=end >= prompt, notes=noting)

    def layer_input(self, layer: int, x: Tensor, rows: StepRows) -> None:
        """Each prompt token's largest activations, noted until it is known which rows stay."""
        for sequence, (begin, end) in zip(rows.sequences, rows.bounds, strict=True):
            assert isinstance(sequence, PerLayerSequence)
            if self.wants_layer_input and sequence.length < sequence.prompt_length:
                most = min(self._sinks, x.shape[1])
                sequence.notes[layer] = x[begin:end].abs().topk(most, 1).values.float()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: StepRows) -> Tensor:
        kernels = self.shape.kernels
        if not self.options.pre_rope:
            kernels.rotate(k, rows.cos, rows.sin)
        if self._value_block > 1:
            v = v.clone()
            self.rows.ops.hadamard(kernels, v, self._value_block)
        out = super().attend(layer, q, k, v, rows)
        if self._value_block > 1:
            self.rows.ops.hadamard(kernels, out, self._value_block)
        return out

    def commit(self, rows: StepRows, kept: Seq[int]) -> None:
        for sequence, count in zip(rows.sequences, kept, strict=True):
            assert isinstance(sequence, PerLayerSequence)
            for layer, largest in sequence.notes.items():
                self._note(sequence, layer, largest[:count])
            sequence.notes.clear()
        super().commit(rows, kept)
        for sequence in rows.sequences:
            if self.wants_layer_input and sequence.length >= sequence.prompt_length:
                self._settle(sequence)

    def _largest(self, sequence: Sequence, layer: int) -> tuple[Tensor, Tensor] | None:
        """The largest activations so far, descending, and their tokens; views, [sinks] each."""
        slot, first = sequence.slot, layer * 2 * self._places
        values, tokens = (self.rows.note(slot, dtype) for dtype in (torch.float32, torch.int32))
        if values is None or tokens is None:
            return None
        second = first + self._places
        return values[first : first + self._sinks], tokens[second : second + self._sinks]

    def _note(self, sequence: Sequence, layer: int, largest: Tensor) -> None:
        held = self._largest(sequence, layer)
        assert held is not None
        values, tokens = held
        if sequence.length == 0:
            values.fill_(-1)
        new = torch.arange(len(largest), device=values.device, dtype=torch.int32) + sequence.length
        all_values = torch.cat([values, largest.flatten()])
        # Of equals the earlier token, however the prompt was chunked: the sort is stable.
        best = all_values.argsort(descending=True, stable=True)[: self._sinks]
        all_tokens = torch.cat([tokens, new.repeat_interleave(largest.shape[1])])
        values.copy_(all_values[best])
        tokens.copy_(all_tokens[best])

    def kept(self, sequence: PerLayerSequence, first: int) -> list[list[int]] | None:
        if first or not self.wants_layer_input:
            return None
        chosen = []
        for layer in range(self.shape.num_layers):
            held = self._largest(sequence, layer)
            assert held is not None
            values, tokens = (x.tolist() for x in held)
            chosen.append(sorted({t for v, t in zip(values, tokens, strict=True) if v >= 0}))
        return chosen

    def _settle(self, sequence: Sequence) -> None:
        if self.rows.note(sequence.slot, torch.uint8) is not None:
            self.rows.settle_kept(sequence.slot)
            self.rows.drop_note(sequence.slot)
