"""One step is what it should be, however it is computed; what is no number is caught."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from training.tiny import CONFIG, VOCAB, Steps, losses, tiny_model, tiny_recipe, tiny_trainer
from trimtab.errors import ConfigError, NumericsError
from trimtab.models.config import config_from_dict
from trimtab.training.data.batch import pack
from trimtab.training.data.segments import Segment
from trimtab.training.loop import Trainer
from trimtab.training.objectives.lm import LanguageModelling, LMOptions
from trimtab.training.watching.metrics import read_lines
from trimtab.training.watching.progress import Progress, duration
from trimtab.training.watching.speed import peak_flops, training_flops


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_step_is_what_torch_makes_of_the_texts_one_by_one(tmp_path: Path) -> None:
    """Plain causal forwards, the mean over all predicted tokens, clipping and AdamW by torch alone."""
    settings = {"name": "adamw", "lr": 0.01, "weight_decay": 0.0, "clip": 0.5}
    trainer = tiny_trainer(tmp_path, optimizer=settings, schedule={"warmup": 0, "decay": 0})
    model, source = tiny_model(), tiny_trainer(tmp_path).source
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(2):
        metrics = trainer.train_step()
        texts: list[Segment] = []
        while sum(map(len, texts)) < 100:
            texts.append(source.next())
        total = torch.zeros(())
        for text in texts:
            tokens = torch.from_numpy(text.tokens)
            logits = model(tokens[None])[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
        loss = total / sum(len(text) - 1 for text in texts)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    ours = weights(trainer)
    theirs = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (ours - theirs).abs().max() < 1e-4


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path, micro_batch_tokens=1000)
    parts = tiny_trainer(tmp_path, micro_batch_tokens=20)
    a, b = whole.train_step(), parts.train_step()
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    segments, _ = trainer.batches.next_batch()
    trainer._backward(segments)
    return [p.grad for p in trainer.model.parameters() if p.grad is not None]


def test_activation_checkpointing_recomputes_the_same_numbers(tmp_path: Path) -> None:
    plain = gradients(tiny_trainer(tmp_path))
    trainer = tiny_trainer(tmp_path, activation_checkpointing=True)
    calls, layer = [], trainer.model.model.layers[0]
    layer.post_attention_layernorm.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(trainer)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    micro_batches = 2
    assert len(calls) == 2 * micro_batches  # once forward, once more on the way back


def test_bfloat16_is_near_and_not_the_same(tmp_path: Path) -> None:
    exact = tiny_trainer(tmp_path).train_step()["loss"]
    trainer = tiny_trainer(tmp_path, precision="bfloat16")
    rounded = trainer.train_step()["loss"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)
    assert trainer.model.dtype == torch.float32


@pytest.mark.slow
def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    plain = gradients(tiny_trainer(tmp_path))
    compiled = gradients(tiny_trainer(tmp_path, compile=True))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_average_is_saved_and_validated(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", tokens=300, ema=0.5)
    average = weights(trainer).clone()
    plain = trainer.train_step

    def step():
        metrics = plain()
        share = 1 - min(0.5, (1 + trainer.step) / (10 + trainer.step))
        average.lerp_(weights(trainer), share)
        return metrics

    trainer.train_step = step  # type: ignore[method-assign]
    trainer.train()
    assert torch.equal(weights(trainer), average)
    saved = read_lines(tmp_path / "run/metrics.jsonl")[-1]["validation_loss"]
    trainer.ema = None
    assert trainer.validate() == pytest.approx(saved, abs=1e-6)


def test_validation_in_nats_perplexity_and_bits_per_byte(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", tokens=200)
    trainer.validation_bytes = 250
    trainer.train()
    found = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    nats, count = 0.0, 0
    with torch.no_grad():
        for text in trainer.validation:
            tokens = torch.from_numpy(text.tokens)
            logits = trainer.model(tokens[None])[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
            count += len(text) - 1
    assert found["validation_loss"] == pytest.approx(nats / count, abs=1e-4)
    assert found["validation_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-3)
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / 250, rel=1e-3)


def test_validation_leaves_out_what_only_steers_the_training(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    plain = trainer.validate()
    trainer.objective = LanguageModelling(LMOptions(z_loss=1.0))
    assert trainer.validate() == plain
    assert trainer.train_step()["loss"] > tiny_trainer(tmp_path).train_step()["loss"] + 1


def test_samples_are_taken_and_change_no_number(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "plain", tokens=500).train()
    trainer = tiny_trainer(tmp_path / "run", tokens=500, samples={"prompts": ["a+b", "c"], "every": 2})
    with pytest.raises(ConfigError, match="samples"):
        trainer.train()

    def generate(model, prompts):
        assert not model.training
        return [f"{prompt}{torch.rand(()).item():.0f}!" for prompt in prompts]

    trainer = tiny_trainer(tmp_path / "other", tokens=500, samples={"prompts": ["a+b", "c"], "every": 2})
    trainer.generate = generate
    trainer.train()
    rounds = read_lines(tmp_path / "other/samples.jsonl")
    assert [r["step"] for r in rounds] == [2, 4, 5]
    assert [s["prompt"] for s in rounds[0]["samples"]] == ["a+b", "c"]
    assert losses(tmp_path / "other") == losses(tmp_path / "plain")
    assert "a+b" in (tmp_path / "other/report.html").read_text()


class Poisoned(LanguageModelling):
    """The loss of step 3 is finite, its gradient is not."""

    def loss_sum(self, model, batch):
        loss = super().loss_sum(model, batch)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 4:
            loss = loss + (model.model.norm.weight * 0).sum().sqrt()
        return loss


def test_a_gradient_that_is_no_number_stops_the_run_before_it_moves_a_weight(tmp_path: Path) -> None:
    source = Steps(0)
    recipe = tiny_recipe(tmp_path / "run", checkpoint_minutes=0, micro_batch_tokens=70)
    trainer = Trainer(recipe, tiny_model(), source, Poisoned())
    with pytest.raises(NumericsError) as caught:
        trainer.train()
    said = str(caught.value)
    assert "norm of the gradient is nan at step 3" in said and "optimizer.lr" in said
    place = tmp_path / "run/failures/step-00000003"
    assert str(place) in said
    assert torch.isfinite(weights(trainer)).all()
    kept = np.load(place / "batch.npz")
    fresh = Steps(0)
    texts = []
    for _ in range(3):
        texts = []
        while sum(map(len, texts)) < 100:
            texts.append(fresh.next())
    assert kept["tokens"].tolist() == np.concatenate([t.tokens for t in texts]).tolist()
    assert kept["ends"].tolist() == np.cumsum([len(t) for t in texts]).tolist()
    assert trainer.folder.checkpoints.joinpath("step-00000002").is_dir()


def test_a_loss_that_is_no_number_keeps_the_micro_batch(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", micro_batch_tokens=30)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[5] = math.nan  # every row's softmax sees it through the head
    with pytest.raises(NumericsError, match="the loss is nan at step 1"):
        trainer.train()
    kept = np.load(tmp_path / "run/failures/step-00000001/batch.npz")
    assert 0 < len(kept["tokens"]) <= 30


class NothingToLearn(Steps):
    def next(self) -> Segment:
        found = super().next()
        return Segment(found.tokens, np.zeros(len(found), dtype=bool))


def test_a_step_without_trained_tokens_is_an_error(tmp_path: Path) -> None:
    trainer = Trainer(tiny_recipe(tmp_path), tiny_model(), NothingToLearn(), LanguageModelling())
    with pytest.raises(ConfigError, match="step 1 has no token to learn from"):
        trainer.train_step()


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device is 'abacus'"):
        tiny_trainer(tmp_path, device="abacus")


def test_tensorboard_that_is_missing_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        tiny_trainer(tmp_path / "run", tensorboard=True).train()


@pytest.mark.slow
def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_trainer(tmp_path / "run", tokens=300, tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    shown = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("loss")]
    assert shown == [line[:2] for line in losses(tmp_path / "run")]


def test_operations_of_a_step() -> None:
    """Counted by hand for the tiny shape: matrices, head and causal attention, forward and twice back."""
    model = tiny_model()
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    forward = 0
    for n in (5, 9):
        pairs = n * (n + 1) // 2
        forward += 2 * n * (matrices + 32 * VOCAB) + 2 * (4 * 32 * pairs)
    assert training_flops(model, model, [5, 9]) == 3 * forward
    model.requires_grad_(False)
    assert training_flops(model, model, [5, 9]) == 2 * forward
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert config_from_dict(CONFIG).head_dim == 16


def test_progress_in_plain_lines() -> None:
    out = io.StringIO()
    metrics = {"lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12_345.6}
    metrics |= {"flops_per_second": 2e10, "flops_share": 0.25}
    with Progress(4, every=1000, console=Console(file=out, width=40)) as progress:
        for step, loss in enumerate((4.0, 3.0, 2.0, 1.0), 1):
            progress.update(metrics | {"step": step, "loss": loss, "validation_loss": 2.5})
        progress.say("done [here]")
    first, last, said = out.getvalue().splitlines()  # one at the start, one at the end, none between
    assert first.startswith("step 1/4  loss 4.0000  validation 2.5000  lr 1.00e-03  grad 0.500  12,346 tok/s")
    assert "20 GFLOP/s (25%)" in first
    assert last.startswith("step 4/4  loss 2.4") and last.endswith("0 s left")
    assert said == "done [here]"
    assert [duration(s) for s in (12.4, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 05 min"]


def test_progress_on_a_terminal_is_one_line_that_is_rewritten() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    metrics = {"lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1.0, "loss": 1.0}
    metrics |= {"flops_per_second": 2e10, "flops_share": 0.25}
    with Progress(3, every=0, console=console) as progress:
        for step in (1, 2, 3):
            progress.update(metrics | {"step": step})
    assert "step 3/3" in out.getvalue() and out.getvalue().count("\n") == 1


def test_packing_is_in_the_order_of_the_segments() -> None:
    a, b = Steps(0).next(), Steps(1).next()
    assert pack([a, b]).tokens.tolist() == [*a.tokens.tolist(), *b.tokens.tolist()]
