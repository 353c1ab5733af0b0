"""Label-supervised fine-tuning: equal to transformers, blind to packing, learnt, saved and used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab
from training.tiny import CONFIG, tiny_recipe
from trimtab.errors import ConfigError, RequestError
from trimtab.models.config import config_from_dict
from trimtab.models.hub import find_folder
from trimtab.models.lora import add_lora, load_adapters
from trimtab.models.shapes import random_model
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.transformer import Model
from trimtab.registry import OBJECTIVES
from trimtab.training.classifier import FACTS, TENSORS, Classifier, classify, pool
from trimtab.training.data.batch import pack
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.base import Source
from trimtab.training.loop import Trainer
from trimtab.training.objectives.classify import Classify, ClassifyOptions
from trimtab.training.starting.initial import initial_model
from trimtab.training.watching.metrics import read_lines

LABELS = ("bad", "fair", "good")


def labelled(tokens: Sequence[int] | np.ndarray, label: int) -> Segment:
    return Segment(np.array(tokens), np.ones(len(tokens), dtype=bool), label)


def some_texts(lengths: Sequence[int]) -> list[Segment]:
    rng = np.random.default_rng(0)
    return [labelled(rng.integers(3, 64, n), i % 3) for i, n in enumerate(lengths)]


@pytest.fixture
def model() -> Model:
    return random_model(config_from_dict(CONFIG), seed=1)


def objective(model: Model, **options: Any) -> Classify:
    found = Classify(ClassifyOptions(**({"labels": LABELS} | options)))
    found.extra_modules(model)
    return found


def twin(model: Model) -> tuple[Any, dict[str, Any]]:
    """transformers' classifier with the same weights, a random head included."""
    transformers = pytest.importorskip("transformers")
    settings = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]}
    config = transformers.LlamaConfig(**settings, rope_parameters=rope, num_labels=3, pad_token_id=0)
    theirs = transformers.LlamaForSequenceClassification(config)
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == ["score.weight"] and not missing.unexpected_keys
    return theirs, {name: p for name, p in theirs.named_parameters()}


def test_logits_loss_and_gradients_are_those_of_transformers(model: Model) -> None:
    theirs, parameters = twin(model)
    ours = objective(model)
    assert ours.classifier is not None
    with torch.no_grad():
        ours.classifier.score.weight.copy_(parameters["score.weight"])
    segments = some_texts([7, 3, 12, 1, 9])
    padded = torch.zeros(5, 12, dtype=torch.long)
    for row, segment in zip(padded, segments, strict=True):
        row[: len(segment)] = torch.from_numpy(segment.tokens)
    wanted = theirs(
        padded, attention_mask=(padded > 0).long(), labels=torch.tensor([s.label for s in segments])
    )
    wanted.loss.backward()

    batch = pack(segments)
    torch.testing.assert_close(
        ours.classifier(model, batch.tokens, batch.lengths), wanted.logits, atol=1e-5, rtol=1e-5
    )
    loss = ours.loss_sum(model, batch) / ours.units(batch)
    torch.testing.assert_close(loss, wanted.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    own = {n: p for n, p in model.named_parameters()} | {"score.weight": ours.classifier.score.weight}
    assert own.keys() == parameters.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_without_the_mask_every_token_sees_its_whole_text(model: Model, pooling: str) -> None:
    theirs, parameters = twin(model)
    ours = objective(model, causal=False, pooling=pooling)
    assert ours.classifier is not None
    segments = some_texts([8, 5])
    batch = pack(segments)
    with torch.no_grad():
        ours.classifier.score.weight.copy_(parameters["score.weight"])
        found = ours.classifier(model, batch.tokens, batch.lengths)
        for i, segment in enumerate(segments):
            everything = torch.zeros(1, 1, len(segment), len(segment))
            tokens = torch.from_numpy(segment.tokens)[None]
            states = theirs.model(tokens, attention_mask=everything).last_hidden_state[0]
            pooled = {"last": states[-1], "mean": states.mean(0), "max": states.max(0).values}[pooling]
            torch.testing.assert_close(found[i], theirs.score(pooled), atol=1e-5, rtol=1e-5)


class WhereIsFive(Source):
    """Texts whose first, middle or last third holds the token 5."""

    def __init__(self) -> None:
        self.cursor = 0

    def next(self) -> Segment:
        rng = np.random.default_rng(self.cursor)
        self.cursor += 1
        tokens, label = rng.integers(10, 20, 9), int(rng.integers(3))
        tokens[3 * label + rng.integers(3)] = 5
        return labelled(tokens, label)

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_a_run_learns_its_classes_and_leaves_the_head(causal: bool, tmp_path: Path) -> None:
    changes = {"tokens": 900 * 150, "batch_tokens": 900, "micro_batch_tokens": 900, "save_dtype": "float32"}
    recipe = tiny_recipe(tmp_path / "run", optimizer={"name": "adamw", "lr": 3e-3}, **changes)
    options = OBJECTIVES.build_options("classify", {"labels": list(LABELS), "causal": causal})
    model = random_model(config_from_dict(CONFIG), seed=1).train()
    Trainer(recipe, model, WhereIsFive(), Classify(options)).train()

    trained = trimtab.load(tmp_path / "run" / "model")
    head = Classifier.load(tmp_path / "run" / "model", trained)
    assert (head.labels, head.pooling, head.causal) == (LABELS, "last", causal)
    source = WhereIsFive()
    source.restore({"cursor": 10**6})
    batch = pack([source.next() for _ in range(200)])
    with torch.no_grad():
        right = head(trained, batch.tokens, batch.lengths).argmax(-1) == batch.labels
    assert right.float().mean() > 0.95


def test_adapters_and_head_alone_are_trained(model: Model) -> None:
    adapters = add_lora(model, rank=2)
    ours, batch = objective(model), pack(some_texts([7, 3, 12]))
    ours.loss_sum(model, batch).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(adapters.named_parameters())
    assert ours.classifier is not None and ours.classifier.score.weight.grad is not None


@pytest.fixture
def reader() -> Model:
    """A tiny model with the shipped model's tokenizer."""
    folder = find_folder(None)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    model = random_model(config_from_dict(CONFIG | {"vocab_size": vocab}), seed=1)
    model.tokenizer = Tokenizer.from_folder(folder, vocab)
    return model


def test_texts_are_classified_and_the_head_is_kept(reader: Model, tmp_path: Path) -> None:
    head = Classifier(32, LABELS, "mean", causal=False, seed=3)
    texts = ["It rained.", "The ship came home at last, and all of us went to see it.", "No."]
    found = classify(reader, head, texts, batch_tokens=8)
    for one in found:
        assert sum(one.probabilities) == pytest.approx(1) and len(one.probabilities) == 3
        assert one.label == LABELS[int(np.argmax(one.probabilities))]
    alone = [classify(reader, head, [text])[0] for text in texts]
    for one, other in zip(found, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert classify(reader, head, []) == []
    head.save(tmp_path, reader)
    assert {f.name for f in tmp_path.iterdir()} == {FACTS, TENSORS}
    assert classify(reader, Classifier.load(tmp_path, reader), texts, batch_tokens=8) == found


def change(folder: Path, **entries: object) -> None:
    (folder / FACTS).write_text(json.dumps(json.loads((folder / FACTS).read_text()) | entries))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / FACTS).unlink(), "is missing, so .* holds no classifier"),
        (lambda f: (f / FACTS).write_text("{"), "cannot be read"),
        (lambda f: change(f, format=9), "no classifier of format 1"),
        (lambda f: change(f, labels="bad"), "no proper entry 'labels'"),
        (lambda f: change(f, pooling="first"), "no proper entry 'pooling'"),
        (lambda f: change(f, labels=["bad", "good"]), "does not hold a head for classifier.json"),
        (lambda f: change(f, model="0" * 64), "was trained with another model"),
        (lambda f: (f / TENSORS).write_bytes(b"junk"), "is missing or damaged"),
    ],
)
def test_a_damaged_classifier_is_one_sentence(model: Model, tmp_path: Path, damage, says: str) -> None:
    Classifier(32, LABELS, "last", causal=True).save(tmp_path, model)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=says) as error:
        Classifier.load(tmp_path, model)
    assert "\n" not in str(error.value)


def test_mistakes_are_one_sentence(model: Model, reader: Model) -> None:
    with pytest.raises(ConfigError, match="needs the option 'labels'"):
        OBJECTIVES.build_options("classify", {})
    with pytest.raises(ConfigError, match="name at least two classes, each once"):
        OBJECTIVES.build_options("classify", {"labels": ["good", "good"]})
    with pytest.raises(ConfigError, match="allowed: last, max, mean"):
        OBJECTIVES.build_options("classify", {"labels": LABELS, "pooling": "first"})
    plain = pack([Segment(np.arange(4), np.ones(4, dtype=bool))])
    with pytest.raises(ConfigError, match="use sources of kind 'labelled'"):
        objective(model).units(plain)
    with pytest.raises(ConfigError, match="have the label 7, but objective 'classify' names 3 classes"):
        objective(model).units(pack([labelled([1, 2], 7)]))
    head = Classifier(32, LABELS, "last", causal=True)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        classify(model, head, ["a"])
    with pytest.raises(RequestError, match="text 1 to classify is empty"):
        classify(reader, head, ["a", ""], first="none")


def test_pooling_takes_each_text_by_itself() -> None:
    states = torch.tensor([[1.0, 5.0], [3.0, 1.0], [2.0, 2.0]])
    assert pool(states, (2, 1), "last").tolist() == [[3, 1], [2, 2]]
    assert pool(states, (2, 1), "mean").tolist() == [[2, 3], [2, 2]]
    assert pool(states, (2, 1), "max").tolist() == [[3, 5], [2, 2]]


@pytest.mark.slow
def test_a_recipe_trains_an_adapter_and_a_head(tmp_path: Path) -> None:
    """From lines of JSON to answers: the adapter, the merged model and the head all belong together."""
    tokenizer = find_folder(None)
    vocab = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    words = ["the", "book", "was", "very", "long", "and", "I", "read", "it", "all"]

    def sentence(label: int) -> str:
        chosen = list(rng.choice(words, 6))
        return " ".join([*chosen[:4], ("awful", "splendid")[label], *chosen[4:]])

    rows = [{"text": sentence(i % 2), "label": ("no", "yes")[i % 2]} for i in range(400)]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {"config": CONFIG | {"vocab_size": vocab}, "tokenizer": str(tokenizer)},
        "lora": {"rank": 8, "targets": "all-linear"},
        "objective": {"name": "classify", "labels": ["no", "yes"], "pooling": "mean", "causal": False},
        "mixture": [
            {"kind": "labelled", "paths": [str(tmp_path / "reviews.jsonl")], "labels": ["no", "yes"]}
        ],
        "validation": {
            "kind": "labelled",
            "paths": [str(tmp_path / "reviews.jsonl")],
            "labels": ["no", "yes"],
            "windows": 4,
        },
        "cache": str(tmp_path / "cache"),
        "tokens": 40_000,
        "batch_tokens": 1000,
        "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0},
    }
    trained = trimtab.train(recipe)
    last = read_lines(trained.output / "metrics.jsonl")[-1]
    assert last["validation_accuracy"] >= 0.98 and "validation_bits_per_byte" not in last
    assert "classified right" in (trained.output / "report.html").read_text()
    assert "nats per text" in (trained.output / "report.html").read_text()
    model = trimtab.load(trained.model)
    head = Classifier.load(trained.model, model)
    found = [one.label for one in classify(model, head, [sentence(i % 2) for i in range(100)])]
    assert sum(label == ("no", "yes")[i % 2] for i, label in enumerate(found)) >= 98
    base = initial_model(config_from_dict(CONFIG | {"vocab_size": vocab}), seed=0)
    load_adapters(base, trained.output / "adapter").fold()
    Classifier.load(trained.model, base)  # the same model by its fingerprint
