"""The C++ kernels as Python calls over torch tensors.

`Library` is one compiled file (one weight type) with its team of threads. `NativeModel` holds the addresses
of a model's weights, exactly as they lie in the model, and runs decoder steps on them. Activations, queries
and logits are float32; cache rows have the model's type, and so have the weights unless they are int8.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.build import INT8, build
from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import Asked, PagedRows


class _Layer(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2")],
        *[(name + "_bias", c_void_p) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        *[(name + "_scale", c_void_p) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        ("window", c_int64),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *[(name, c_int32) for name in ("n_layers", "D", "I", "H", "G", "d", "vocab")],
        ("eps", c_float),
        ("embed", c_void_p),
        ("head", c_void_p),
        *[(name, c_void_p) for name in ("norm", "embed_scale", "head_scale")],
        ("layers", POINTER(_Layer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[
            (name, c_void_p)
            for name in ("tokens", "cos", "sin", "cos_sinks", "sin_sinks", "logit_rows", "logits", "hidden")
        ],
        *[(name, c_void_p) for name in ("queries", "lse")],
        *[(name, c_int32) for name in ("n", "n_logits", "rotated")],
    ]


def _ptr(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def kind_of(dtype: torch.dtype, int8: bool = False) -> str:
    """The name of the library for cache rows of type `dtype`, with weights of that type or in int8."""
    return str(dtype).removeprefix("torch.") + (INT8 if int8 else "")


class Library:
    """The kernels for cache rows of type `dtype`, with `threads` threads of their own.

    Weights have that type too, or are `int8` with a factor for each row. Raises OSError where the kernels
    cannot be compiled.
    """

    def __init__(self, dtype: torch.dtype, threads: int, int8: bool = False) -> None:
        path = build(kind_of(dtype, int8))
        if path is None:
            raise OSError("no CPU kernels for this machine")
        lib = ctypes.CDLL(str(path))
        lib.tt_team_new.restype = lib.tt_model_new.restype = c_void_p
        lib.tt_read.restype = c_float
        lib.tt_shared.restype = c_int64
        pointers = {
            "tt_rounds_inputs": [],
            "tt_team_new": [c_int32],
            "tt_team_free": [c_void_p],
            "tt_model_new": [c_void_p, c_void_p],
            "tt_model_free": [c_void_p],
            "tt_step": [c_void_p] * 3,
            "tt_step_coded": [c_void_p] * 3,
            "tt_embed": [c_void_p, c_void_p, c_int32, c_void_p],
            "tt_layer_in": [c_void_p, c_int32, c_int32, *[c_void_p] * 4],
            "tt_layer_out": [c_void_p, c_int32, c_int32, *[c_void_p] * 2],
            "tt_finish": [c_void_p] * 3,
            "tt_rotate": [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p],
            "tt_write": [c_void_p, c_void_p, c_void_p, c_int32],
            "tt_attend": [c_void_p] * 5,
            "tt_attend_top": [c_void_p] * 3 + [c_int32] * 2 + [c_void_p] * 3,
            "tt_column_sums": [c_void_p] * 4 + [c_int32, c_void_p, c_int64, c_int64],
            "tt_shared": [c_void_p, c_void_p],
            "tt_merge": [c_int32, c_int32, *[c_void_p] * 4],
            "tt_attend_coded": [c_void_p] * 5,
            "tt_attend_top_coded": [c_void_p] * 3 + [c_int32] * 2 + [c_void_p] * 3,
            "tt_write_coded": [c_void_p] * 3 + [c_int32],
            "tt_column_sums_coded": [c_void_p] * 4 + [c_int32, c_void_p, c_int64, c_int64],
            "tt_code": [c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int32],
            "tt_heavy": [c_void_p, c_void_p, c_int32, c_int32, *[c_void_p] * 3],
            "tt_moments": [c_void_p, c_void_p, c_int64, *[c_int32] * 4, *[c_void_p] * 2],
            "tt_matmul": [c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_int32, c_int32, c_void_p],
            "tt_sample": [c_void_p, c_void_p, c_int32, c_int32],
            "tt_read": [c_void_p, c_void_p, c_int64],
        }
        for name, types in pointers.items():
            getattr(lib, name).argtypes = types
        self.lib: Any = lib
        self.weight_dtype = torch.int8 if int8 else dtype
        self.team = lib.tt_team_new(threads)

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations are rounded to bf16 where weights multiply them (AVX512-BF16 processors)."""
        return bool(self.lib.tt_rounds_inputs())

    def __del__(self) -> None:
        if getattr(self, "team", None):
            self.lib.tt_team_free(self.team)
            self.team = None

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary embedding in place: x float32 [N, heads, d], cos and sin [N, d / 2]."""
        n, heads, d = x.shape
        self.lib.tt_rotate(x.data_ptr(), n, heads, d, cos.data_ptr(), sin.data_ptr())

    def write(self, rows: PagedRows, k: Tensor, v: Tensor) -> None:
        """Store k, v float32 [N, G, d] behind the rows that each span's sequence holds."""
        self.lib.tt_write(ctypes.byref(rows.as_struct()), k.data_ptr(), v.data_ptr(), k.shape[0])

    def attend(self, rows: PagedRows, q: Tensor) -> tuple[Tensor, Tensor]:
        """(out [N, H, d], logsumexp [N, H]) of rotated q float32 [N, H, d] over the pages.

        Rows outside the spans come back as the empty segment: 0 and -inf.
        """
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf)
        self.lib.tt_attend(
            self.team, ctypes.byref(rows.as_struct()), q.data_ptr(), out.data_ptr(), lse.data_ptr()
        )
        return out, lse

    def shared(self, rows: PagedRows) -> tuple[Tensor, int]:
        """Keys that each span attends to together with others, int32 [spans], and how many held keys a layer
        reads for all spans, those counted once."""
        begun = torch.zeros(rows.spans.shape[0], dtype=torch.int32)
        keys = self.lib.tt_shared(ctypes.byref(rows.as_struct()), begun.data_ptr())
        return begun, keys

    def attend_top(
        self, rows: PagedRows, q: Tensor, n: int, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend`, but only the values of each query head's `n` largest probabilities are fetched.

        The probabilities are those of the softmax over all keys; `renormalize` makes the chosen ones sum to
        one. Also returns how many rows of values each row and KV head needed: int32 [N, G].
        """
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf)
        fetched = torch.zeros(q.shape[0], rows.num_kv_heads, dtype=torch.int32)
        self.lib.tt_attend_top(
            self.team,
            ctypes.byref(rows.as_struct()),
            q.data_ptr(),
            n,
            renormalize,
            out.data_ptr(),
            lse.data_ptr(),
            fetched.data_ptr(),
        )
        return out, lse, fetched

    def merge(self, segments: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention [N, H, d] over the union of segments (out, logsumexp); the first one is overwritten."""
        out, lse = segments[0]
        for other, z in segments[1:]:
            self.lib.tt_merge(
                lse.numel(),
                out.shape[-1],
                out.data_ptr(),
                lse.data_ptr(),
                other.data_ptr(),
                z.data_ptr(),
            )
        return out

    def column_sums(self, rows: PagedRows, q: Tensor, lse: Tensor, sums: Tensor, first_row: int = 0) -> None:
        """Add the attention each held key receives to `sums` float32 [spans, G, keys]."""
        self.lib.tt_column_sums(
            self.team,
            ctypes.byref(rows.as_struct()),
            q.data_ptr(),
            lse.data_ptr(),
            first_row,
            sums.data_ptr(),
            sums.stride(0),
            sums.stride(1),
        )

    def heavy(self, rows: PagedRows, q: Tensor, lse: Tensor, each: Tensor) -> None:
        """Score the rows of a step by what its rotated queries q [L, N, H, d] gave them (lse [L, N, H]), in
        all layers, and drop the lowest ones. `each` int64 [spans, 6]: see evict.h's Heavy."""
        self.lib.tt_heavy(
            self.team,
            ctypes.byref(rows.as_struct()),
            q.shape[0],
            q.shape[1],
            q.data_ptr(),
            lse.data_ptr(),
            each.data_ptr(),
        )

    def moments(self, q: Tensor, total: Tensor, outer: Tensor) -> None:
        """Add queries q float32 [L, n, H, d] (a slice of rows) to `total` [L, H, d] and, of their outer
        products, the upper triangle to `outer` [L, H, d, d], in the order of the rows."""
        layers, n, heads, d = q.shape
        assert q.stride()[1:] == (heads * d, d, 1) and d % 16 == 0
        self.lib.tt_moments(
            self.team, q.data_ptr(), q.stride(0), n, layers, heads, d, total.data_ptr(), outer.data_ptr()
        )

    def write_coded(self, c: CodedTables, k: Tensor, v: Tensor) -> None:
        """Store the new rows k, v float32 [N, G, d] of every span in full."""
        self.lib.tt_write_coded(ctypes.byref(c.as_struct()), k.data_ptr(), v.data_ptr(), k.shape[0])

    def attend_coded(self, c: CodedTables, q: Tensor) -> tuple[Tensor, Tensor]:
        """(out [N, H, d], logsumexp [N, H]) of rotated q float32 over coded and full rows."""
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf)
        self.lib.tt_attend_coded(
            self.team, ctypes.byref(c.as_struct()), q.data_ptr(), out.data_ptr(), lse.data_ptr()
        )
        return out, lse

    def attend_top_coded(
        self, c: CodedTables, q: Tensor, n: int, renormalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend_top`, over coded and full rows. The rows of values fetched are int32 [N, G, 2]: coded
        ones, and those in full."""
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf)
        fetched = torch.zeros(q.shape[0], c.rows.num_kv_heads, 2, dtype=torch.int32)
        self.lib.tt_attend_top_coded(
            self.team,
            ctypes.byref(c.as_struct()),
            q.data_ptr(),
            n,
            renormalize,
            out.data_ptr(),
            lse.data_ptr(),
            fetched.data_ptr(),
        )
        return out, lse, fetched

    def column_sums_coded(
        self, c: CodedTables, q: Tensor, lse: Tensor, sums: Tensor, first_row: int = 0
    ) -> None:
        """Add the attention each held key receives to `sums` float32 [spans, G, keys]."""
        self.lib.tt_column_sums_coded(
            self.team,
            ctypes.byref(c.as_struct()),
            q.data_ptr(),
            lse.data_ptr(),
            first_row,
            sums.data_ptr(),
            sums.stride(0),
            sums.stride(1),
        )

    def code(self, c: CodedTables, slot: int, layers: int, k_to: Tensor, v_to: Tensor) -> None:
        """Code keys up to `k_to` and values up to `v_to` (int32 [L, G]) of one sequence."""
        many = int((k_to - c.k_done[slot]).sum()) > 8 * k_to.numel()
        self.lib.tt_code(
            self.team,
            ctypes.byref(c.as_struct()),
            slot,
            layers,
            k_to.data_ptr(),
            v_to.data_ptr(),
            many,
        )

    def matmul(self, x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
        """x float32 [M, K] times w [N, K] transposed; a row's bits do not depend on the other rows.

        `scale` float32 [N]: the factors of the rows of w where they are int8.
        """
        y = torch.empty(x.shape[0], w.shape[0])
        n, k = w.shape
        self.lib.tt_matmul(self.team, x.data_ptr(), x.shape[0], w.data_ptr(), _ptr(scale), n, k, y.data_ptr())
        return y

    def read(self, buffer: Tensor) -> float:
        """Read a float32 buffer once with all threads (the bandwidth probe)."""
        return self.lib.tt_read(self.team, buffer.data_ptr(), buffer.numel())


class NativeModel:
    """A dense model's weights as addresses; `config` is a ModelConfig, `weights` its state dict.

    A matrix `NAME.weight` in int8 has its rows' factors beside it as `NAME.scale`.
    """

    def __init__(self, library: Library, config: Any, weights: Mapping[str, Tensor]) -> None:
        self.library = library
        self.config = config
        self._keep: list[Any] = []  # what C++ points at must stay alive
        layers = (_Layer * config.num_layers)()
        for i in range(config.num_layers):
            at = f"model.layers.{i}."
            layer = layers[i]
            for field, name in {
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.o_proj",
                "gate": "mlp.gate_proj",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
            }.items():
                setattr(layer, field, self._hold(weights[f"{at}{name}.weight"]))
                setattr(layer, field + "_bias", self._float(weights.get(f"{at}{name}.bias")))
                setattr(layer, field + "_scale", self._float(weights.get(f"{at}{name}.scale")))
            layer.norm1 = self._float(weights[at + "input_layernorm.weight"])
            layer.norm2 = self._float(weights[at + "post_attention_layernorm.weight"])
            layer.q_norm = self._float(weights.get(at + "self_attn.q_norm.weight"))
            layer.k_norm = self._float(weights.get(at + "self_attn.k_norm.weight"))
            layer.window = config.sliding_windows[i] or 0
        embed = "model.embed_tokens"
        head = "lm_head" if "lm_head.weight" in weights else embed
        shape = _Shape(
            n_layers=config.num_layers,
            D=config.hidden_size,
            I=config.intermediate_size,
            H=config.num_heads,
            G=config.num_kv_heads,
            d=config.head_dim,
            vocab=config.vocab_size,
            eps=config.rms_norm_eps,
            embed=self._hold(weights[embed + ".weight"]),
            head=self._hold(weights[head + ".weight"]),
            norm=self._float(weights["model.norm.weight"]),
            embed_scale=self._float(weights.get(embed + ".scale")),
            head_scale=self._float(weights.get(head + ".scale")),
            layers=layers,
        )
        self._keep += [layers, shape]
        self._step = _Step()
        self._step_ref = ctypes.byref(self._step)
        self._held: tuple[PagedRows | CodedTables, Any, Any, Any] | None = None
        self._handle = library.lib.tt_model_new(ctypes.byref(shape), library.team)

    def _hold(self, tensor: Tensor) -> int:
        tensor = tensor.detach()
        expected = self.library.weight_dtype
        assert tensor.dtype == expected and tensor.is_contiguous(), (tensor.dtype, tensor.stride())
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _float(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().float().contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.library.lib.tt_model_free(self._handle)
            self._handle = None

    def step(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: PagedRows | CodedTables,
        logit_rows: Tensor,
        hidden: Tensor | None = None,
        asked: Asked | None = None,
    ) -> Tensor:
        """All layers over rows in pages, plain or partly coded: tokens int64 [N], cos and sin float32
        [N, d / 2], logit_rows int32 [R]. Returns logits float32 [R, V]; fills `hidden` float32 [N, D] and
        `asked` if given."""
        st, new = self._step, rows.rows if isinstance(rows, CodedTables) else rows
        logits = torch.empty(logit_rows.shape[0], self.config.vocab_size)
        st.tokens, st.cos, st.sin = tokens.data_ptr(), cos.data_ptr(), sin.data_ptr()
        st.cos_sinks, st.sin_sinks = map(_ptr, new.sinks_cos_sin or (None, None))
        st.logit_rows, st.logits, st.hidden = logit_rows.data_ptr(), logits.data_ptr(), _ptr(hidden)
        st.n, st.n_logits = tokens.shape[0], logit_rows.shape[0]
        st.queries, st.lse, st.rotated = None, None, 0
        if asked is not None:
            st.queries, st.lse, st.rotated = _ptr(asked.queries), _ptr(asked.lse), asked.rotated
        if self._held is None or self._held[0] is not rows:
            struct, lib = rows.as_struct(), self.library.lib
            run, paged = (lib.tt_step, struct) if new is rows else (lib.tt_step_coded, struct.rows)
            self._held = rows, run, ctypes.byref(struct), paged
        _, run, reference, paged = self._held  # between the steps of one cache only these change:
        paged.spans, paged.n_spans = new.spans.data_ptr(), new.spans.shape[0]
        paged.mask, paged.depth = _ptr(new.mask), _ptr(new.depth)
        run(self._handle, self._step_ref, reference)
        return logits

    def embed(self, tokens: Tensor) -> Tensor:
        x = torch.empty(tokens.shape[0], self.config.hidden_size)
        self.library.lib.tt_embed(self._handle, tokens.data_ptr(), tokens.shape[0], x.data_ptr())
        return x

    def layer_in(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm and projections of layer `layer`: q [N, H, d], k and v [N, G, d], before rotary embedding."""
        c, n = self.config, x.shape[0]
        q = torch.empty(n, c.num_heads, c.head_dim)
        k = torch.empty(n, c.num_kv_heads, c.head_dim)
        v = torch.empty(n, c.num_kv_heads, c.head_dim)
        self.library.lib.tt_layer_in(
            self._handle, layer, n, x.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()
        )
        return q, k, v

    def layer_out(self, layer: int, x: Tensor, attended: Tensor) -> None:
        """Output projection and MLP of layer `layer`, added to x [N, D] in place."""
        self.library.lib.tt_layer_out(self._handle, layer, x.shape[0], x.data_ptr(), attended.data_ptr())

    def finish(self, x: Tensor, logit_rows: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Final norm and output head for the chosen rows of x."""
        st = self._step
        logits = torch.empty(logit_rows.shape[0], self.config.vocab_size)
        st.logit_rows, st.logits, st.hidden = logit_rows.data_ptr(), logits.data_ptr(), _ptr(hidden)
        st.n, st.n_logits = x.shape[0], logit_rows.shape[0]
        self.library.lib.tt_finish(self._handle, ctypes.byref(st), x.data_ptr())
        return logits


def unsupported(config: Any, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why a model's attention cannot run on the C++ kernels (empty: it can)."""
    reasons = []
    if device.type != "cpu":
        reasons.append(f"the C++ kernels run on the CPU and the model is on {device}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"the C++ kernels know float32, bfloat16 and float16, not {dtype}")
    if config.head_dim % 16 or config.head_dim > 512:
        reasons.append(
            f"the C++ kernels need a head size divisible by 16 and at most 512; it is {config.head_dim}"
        )
    return reasons


def unsupported_layers(config: Any) -> list[str]:
    """Why a model's layers cannot run on the C++ kernels even where its attention can."""
    if config.moe is not None:
        return ["the C++ kernels run dense MLPs, and this model routes to experts"]
    return []
