"""What other libraries make of the same data."""

import random

import pytest

from training.data.small import CHAT, TEXTS, tokenizer, write_lines
from training.data.test_chat_format import TAGGED
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.files import find_files
from trimtab.training.data.readers import read_records
from trimtab.training.data.sources.build import SourceContext, build_source

pytestmark = pytest.mark.slow


def test_masks_equal_those_of_trl(tmp_path):
    """TRL's SFTTrainer prepares prompt/completion pairs and, with tags in the template, chats."""
    pytest.importorskip("trl")
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    folder = tokenizer_folder(tmp_path)
    ours = Tokenizer.from_folder(folder)
    pairs = [{"prompt": "The quick", "completion": " brown fox"}, {"prompt": "x:\n", "completion": "  y\nz"}]
    chats = [{"messages": CHAT[:2]}, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}]
    context = SourceContext(ours, ours.vocab_size, tmp_path, tmp_path / "cache")
    for kind, records in (("completions", pairs), ("chat", chats)):
        write_lines(tmp_path / f"{kind}.jsonl", records)
        store = build_source({"kind": kind, "paths": [f"{kind}.jsonl"]}, context).store  # type: ignore[attr-defined]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        config = transformers.LlamaConfig(
            vocab_size=ours.vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        trainer = SFTTrainer(
            transformers.LlamaForCausalLM(config),
            SFTConfig(
                str(tmp_path / "trl"), report_to="none", use_cpu=True, assistant_only_loss=kind == "chat"
            ),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=theirs,
        )
        for i, expected in enumerate(trainer.train_dataset):
            found = store.document(i)
            assert found.tokens.tolist() == expected["input_ids"], (kind, i)
            trained = [label != -100 for label in expected["labels"]]
            # A first token has a label there and nothing to predict it from.
            assert found.trained.tolist()[1:] == trained[1:], (kind, i)


def tokenizer_folder(tmp_path):
    import json

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer().backend.to_str(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TAGGED,
        **tokenizer().special_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_folders_that_datasets_writes_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:1])
    )
    splits.save_to_disk(str(tmp_path / "disk"), num_shards={"train": 2, "test": 1})
    for split, expected in (("train", rows), ("test", rows[:1])):
        files = find_files(["disk"], tmp_path, split=split)
        assert [r for f in files for r in read_records(f)] == expected
    splits["train"].to_parquet(str(tmp_path / "hub/data/train-00000-of-00001.parquet"))
    splits["test"].to_json(str(tmp_path / "hub/data/test.jsonl"))
    assert list(read_records(find_files(["hub"], tmp_path)[0])) == rows
    assert list(read_records(find_files(["hub"], tmp_path, "test")[0])) == rows[:1]


def test_files_are_streamed(tmp_path):
    import tracemalloc

    rng = random.Random(0)
    records = [{"text": rng.randbytes(500).hex()} for _ in range(30_000)]
    for name in ("big.jsonl.zst", "big.jsonl.gz", "big.jsonl"):
        write_lines(tmp_path / name, records)
        tracemalloc.start()
        count = sum(1 for _ in read_records(tmp_path / name))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 30_000 and peak < 8_000_000, (name, peak)  # of 30 MB of text
