"""What is fitted, on a small random model: against the definition, and whatever the order of memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvcache.policies import small_model, text
from trimtab.attachment import Attachment, Base
from trimtab.calibration.base import CalibrationOptions, fit
from trimtab.calibration.fitting.look import keys_and_values, with_gradients
from trimtab.calibration.kvquant import BITS, KVQuantCalibrationOptions
from trimtab.errors import ConfigError
from trimtab.kernels.reference_per_layer import transformed
from trimtab.models.rotary import rotate
from trimtab.registry import CALIBRATIONS

TEXTS = [text(60, seed) for seed in range(5)]
SIZES = {"sequences": 5, "tokens": 60}


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"tokens": tokens}) for tokens in TEXTS))
    return str(file)


def keys(layer: int, sinks: int, rotated: bool) -> torch.Tensor:
    """Of all texts, [tokens, width]."""
    model, found = small_model(), []
    cos, sin = model.rotary.cos_sin(torch.arange(60))
    for tokens in TEXTS:
        k = keys_and_values(model, torch.tensor(tokens))[0][layer]
        found.append((rotate(k, cos, sin) if rotated else k)[sinks:].flatten(1))
    return torch.cat(found)


def test_thresholds_are_the_percentiles(data: str) -> None:
    made = fit("kvquant", small_model(), data, SIZES | {"outliers": 0.05, "sinks": 2})
    ranges = made.tensor("k_range", (2, 2, 2, 2, 32), torch.float32)
    for layer in range(2):
        for view in range(2):
            k = keys(layer, 2, rotated=view == 1).double()
            torch.testing.assert_close(ranges[view, 0, layer, 0].double(), k.amin(0))
            torch.testing.assert_close(ranges[view, 0, layer, 1].double(), k.amax(0))
            for end, t in ((0, 0.025), (1, 0.975)):
                expected = k.quantile(t, 0)
                torch.testing.assert_close(
                    ranges[view, 1, layer, end].double(), expected, atol=1e-5, rtol=1e-5
                )


def test_gradients_are_those_of_the_loss() -> None:
    """Moving a value a little moves the loss by its gradient."""
    model, tokens = small_model(), torch.tensor(TEXTS[0])
    gradients = with_gradients(model, tokens)
    assert len(gradients) == 2 and gradients[0][2].shape == (60, 2, 16)
    for layer, at in ((0, 7), (1, 31)):
        v_bias = torch.zeros(32)
        v_bias[at] = 1e-2
        losses = []
        for sign in (1, -1):
            hook = model.model.layers[layer].self_attn.v_proj.register_forward_hook(  # type: ignore[union-attr]
                lambda module, args, out, s=sign, b=v_bias: out + s * b
            )
            with torch.no_grad():
                logits = model(tokens[None])[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:]))
            hook.remove()
        expected = gradients[layer][3].flatten(1)[:, at].sum().double()
        assert float((losses[0] - losses[1]) / 2e-2) == pytest.approx(float(expected), rel=0.02, abs=1e-5)


def test_codebooks_of_every_width_and_what_they_are_worth(data: str) -> None:
    made = fit("kvquant", small_model(), data, SIZES)
    for bits in BITS:
        for what, axes in (("k", (2, 2)), ("v", (2,))):
            book = made.tensor(f"{what}_codebook_{bits}", (*axes, 2, 2**bits), torch.float32)
            assert bool((book.diff(dim=-1) > 0).all()) and float(book.abs().max()) <= 1
            mean, deviation, after, spread = made.tensor(
                f"{what}_moments_{bits}", (*axes, 2, 4), torch.float32
            ).unbind(-1)
            assert bool(((spread - deviation).abs() < 0.5 / bits * deviation).all())
            assert bool(((after - mean).abs() < 0.2).all())


def test_the_same_again_with_the_same_seed_and_frozen_parameters(data: str) -> None:
    first = fit("kvquant", small_model(), data, SIZES)
    for parameter in small_model().parameters():
        parameter.requires_grad_(False)
    try:
        again = fit("kvquant", small_model(), data, SIZES)
    finally:
        for parameter in small_model().parameters():
            parameter.requires_grad_(True)
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert all(parameter.grad is None for parameter in small_model().parameters())


def test_channels_are_sorted_by_their_signed_sum(data: str) -> None:
    made = fit("rotatekv", small_model(), data, SIZES)
    order = made.tensor("order", (2, 32), torch.int64)
    for layer in range(2):
        sums = transformed(keys(layer, 0, rotated=False), 32).double().sum(0)[order[layer]]
        assert bool((sums.diff() >= -1e-4).all()) and float(sums[-1] - sums[0]) > 1


def test_what_was_done_is_written_down(data: str, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    made = fit("kvquant", small_model(), data, SIZES, lambda text, share: said.append((text, share)))
    assert made.base == Base.of(small_model())
    assert made.options == {**SIZES, "seed": 0, "outliers": 0.01, "sinks": 1}
    assert made.made["data"] == "texts.jsonl" and made.made["tokens"] == 300
    assert [share for _, share in said] == sorted(share for _, share in said) and said[-1][1] < 1
    loaded = Attachment.load(made.save(tmp_path / "kvquant"))
    assert loaded.made == made.made
    loaded.check(small_model())


def test_texts_are_clipped_to_the_context(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"tokens": text(1300)}))
    made = fit("rotatekv", small_model(), str(file), {"sequences": 2})
    assert made.made["tokens"] == 2 * 600


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sequences": 0}, "'sequences' is 0"),
        ({"tokens": 0}, "'tokens' is 0"),
        ({"outliers": 0.0}, "'outliers' is 0.0; it must be above 0"),
        ({"sinks": -1}, "'sinks' is -1"),
        ({"tokens": 3, "sinks": 2}, "'sinks' is 2"),
        ({"bits": 3}, "unknown option 'bits' of attachment method 'kvquant'"),
    ],
)
def test_options_are_checked(data: str, options: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fit("kvquant", small_model(), data, options)


def test_every_calibration_has_the_common_options() -> None:
    for name in CALIBRATIONS.names():
        assert issubclass(CALIBRATIONS.get(name).options, CalibrationOptions), name
    assert KVQuantCalibrationOptions().sequences == 16 and KVQuantCalibrationOptions().tokens == 2048
