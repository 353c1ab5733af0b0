import json

import pytest

from training.data.small import CHAT, TEXTS, tokenizer, write_lines
from trimtab.errors import ConfigError, OutputError
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.starting.tokenizers.train import TokenizerSettings, train_tokenizer


def test_a_trained_tokenizer_gives_every_text_back():
    made = tokenizer()
    assert 263 < made.vocab_size <= 400
    assert (made.pad_id, made.bos_id, made.special_tokens["eos_token"]) == (0, 1, "<|eos|>")
    assert made.special_ids == frozenset(range(7)) and made.eos_ids == {2}
    for text in [*TEXTS, "never seen: Žluťoučký kůň 🎉\n\t  end "]:
        ids = made.encode(text)
        assert ids[0] == made.bos_id and made.decode(ids) == text
    assert len(made.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert made.encode("12345", add_special_tokens=False) == [made.token_to_id(d) for d in "12345"]
    assert made.apply_chat_template(CHAT[:1]) == "<|bos|><|user|>What is 1 + 2?<|end|><|assistant|>"


def test_files_of_several_kinds_and_settings(tmp_path):
    write_lines(tmp_path / "a.jsonl.zst", [{"body": "2024 2024 2024 hello hello"}] * 3)
    write_lines(tmp_path / "b.jsonl", [{"body": "2024 world world"}] * 3)
    settings = TokenizerSettings(
        300, bos="<s>", eos="</s>", pad="<p>", others=(), chat_template=None, split_digits=False, begin=False
    )
    made = train_tokenizer(["*.jsonl*"], tmp_path / "made", settings, column="body", root=tmp_path)
    assert len(made.encode("2024")) == 1 and len(made.encode(" hello")) == len(made.encode(" world")) == 1
    assert made.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"}
    assert not made.chat_templates and made.vocab_size < 300
    again = train_tokenizer(["*.jsonl*"], tmp_path / "again", settings, column="body", root=tmp_path)
    assert again.backend.to_str() == made.backend.to_str()
    with pytest.raises(OutputError, match="exists and is not empty"):
        train_tokenizer(["*.jsonl*"], tmp_path / "made", settings, column="body", root=tmp_path)
    with pytest.raises(
        ConfigError, match=r"a.jsonl.zst, line 1: no 'text' \(there is 'body'\); set 'column'"
    ):
        train_tokenizer(["*.jsonl*"], tmp_path / "other", settings, root=tmp_path)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 262}, "'vocab_size' is 262; the bytes and special tokens alone are 263"),
        ({"bos": "<|eos|>"}, "must be different texts"),
        ({"others": ("",)}, "none of them empty"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerSettings(**{"vocab_size": 300} | changes)


@pytest.mark.slow
def test_transformers_reads_the_folder_alike(tmp_path):
    from transformers import AutoTokenizer

    write_lines(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS])
    made = train_tokenizer(["texts.jsonl"], tmp_path / "made", TokenizerSettings(350), root=tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in [*TEXTS, "<|user|>hi<|end|>"]:
        assert theirs(text)["input_ids"] == made.encode(text)
    assert theirs.apply_chat_template(CHAT, tokenize=False) == made.apply_chat_template(CHAT, False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert isinstance(Tokenizer.from_folder(tmp_path / "made"), Tokenizer)
    assert json.loads((tmp_path / "made/tokenizer_config.json").read_text())["bos_token"] == "<|bos|>"
