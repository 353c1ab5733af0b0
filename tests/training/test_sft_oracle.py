"""Supervised fine-tuning is TRL's: the same tokens learnt, equal loss and gradients, packed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from training.tiny import CONFIG
from trimtab.models.config import config_from_dict
from trimtab.models.hub import find_folder
from trimtab.models.lora import add_lora, save_peft
from trimtab.models.save import save
from trimtab.models.shapes import random_model
from trimtab.training.data.batch import pack
from trimtab.training.data.chat_format import conversation_segment
from trimtab.training.data.encoding import encode
from trimtab.training.data.formats import CompletionFormat
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.build import end_token, first_token
from trimtab.training.objectives.lm import LanguageModelling

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + "
    "'<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATS = [
    [("user", "What is the name of the ship?"), ("assistant", "It is the Pequod.")],
    [
        ("system", "Answer in one word."),
        ("user", "Who is the captain?"),
        ("assistant", "Ahab."),
        ("user", "And whom does he hunt, if one may ask?"),
        ("assistant", "A whale."),
    ],
    [
        ("user", "Good morning to you!"),
        ("assistant", "Good morning. It rains, and the wind has turned."),
    ],
    [("user", "Bye."), ("assistant", "Bye.")],
]
PAIRS = [
    ("The name of the ship is", " the Pequod, and it sails from Nantucket."),
    ("It rained", " all day."),
    ("He said that nobody on board would ever see the coast again, and", " so it was."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the shipped tokenizer and a template that marks what is learnt."""
    shipped, made = find_folder(None), tmp_path_factory.mktemp("sft") / "model"
    vocab = json.loads((shipped / "config.json").read_text())["vocab_size"]
    save(random_model(config_from_dict(CONFIG | {"vocab_size": vocab}), seed=1), made)
    for file in shipped.glob("tokenizer*"):
        shutil.copyfile(file, made / file.name)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return made


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def trl_trainer(folder: Path, out: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    """TRL's trainer with all rows in one batch."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    config = trl.SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        **{"max_length": 128, **settings},
    )
    return trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )


def their_segments(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[bool]]]:
    """What a batch of TRL holds: of each text its tokens, and which of them are learnt."""
    tokens, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch:  # packed: a text begins where positions do
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], tokens.shape[1]], strict=True)]
        rows = [(tokens[0, cut], labels[0, cut]) for cut in cuts]
    else:
        kept = batch["attention_mask"].bool()
        rows = [(t[k], lab[k]) for t, lab, k in zip(tokens, labels, kept, strict=True)]
    return [(t.tolist(), [False, *(lab[1:] >= 0).tolist()]) for t, lab in rows]


def our_segments(segments: list[Segment]) -> list[tuple[list[int], list[bool]]]:
    return [(s.tokens.tolist(), [False, *s.trained[1:].tolist()]) for s in segments]


def compare(trainer: Any, segments: list[Segment], model: Any) -> None:
    """Their loss and gradients on their batch, ours on our segments."""
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == (1 if trainer.args.packing else len(segments))
    assert sorted(their_segments(batch)) == sorted(our_segments(segments))
    trainer.model.train()
    wanted = trainer.compute_loss(trainer.model, dict(batch))
    wanted.backward()

    objective, packed = LanguageModelling(), pack(segments)
    loss = objective.loss_sum(model, packed) / objective.units(packed)
    loss.backward()
    torch.testing.assert_close(loss, wanted.detach(), atol=1e-5, rtol=1e-5)
    theirs = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(theirs) == len(ours)
    for name, gradient in ours.items():
        their_name = name if name in theirs else f"base_model.model.{name}.default.weight"
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, theirs[their_name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_chats(folder: Path, tmp_path: Path, packing: bool) -> None:
    rows = [{"messages": messages(chat)} for chat in CHATS]
    settings = dict(assistant_only_loss=True, packing=packing)
    model = trimtab.load(folder)
    segments = [conversation_segment(model.tokenizer, messages(chat)) for chat in CHATS]
    if packing:
        settings["max_length"] = sum(len(s) for s in segments)  # one bin holds all
    compare(trl_trainer(folder, tmp_path, rows, **settings), segments, model)


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_and_completions(folder: Path, tmp_path: Path, packing: bool) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    model = trimtab.load(folder)
    tokenizer = model.tokenizer
    form = CompletionFormat(first=first_token(tokenizer, "auto"), last=end_token(tokenizer, True))
    segments = encode(tokenizer, [form.read(row, tokenizer) for row in rows])
    settings: dict[str, Any] = dict(completion_only_loss=True, packing=packing)
    if packing:
        settings["max_length"] = sum(len(s) for s in segments)
    compare(trl_trainer(folder, tmp_path, rows, **settings), segments, model)


def test_with_an_adapter(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trimtab.load(folder)
    adapters = add_lora(model, rank=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.named_parameters().values():
            parameter.normal_(std=0.2, generator=generator)
    save_peft(adapters, tmp_path / "adapter")
    rows = [{"messages": messages(chat)} for chat in CHATS]
    trainer = trl_trainer(folder, tmp_path / "out", rows, assistant_only_loss=True)
    trainer.model = peft.PeftModel.from_pretrained(trainer.model, tmp_path / "adapter", is_trainable=True)
    compare(trainer, [conversation_segment(model.tokenizer, messages(chat)) for chat in CHATS], model)
