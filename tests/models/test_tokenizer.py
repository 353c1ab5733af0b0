"""Tokenizers of the families against transformers' AutoTokenizer, and folders that are broken."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from models.tokenizer_zoo import KINDS, TEXTS, write
from trimtab.errors import CheckpointError, RequestError
from trimtab.models.hub import find_folder
from trimtab.models.tokenizer import Tokenizer

SHIPPED = find_folder(None)


def auto_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = write(request.param, tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.from_folder(folder), auto_tokenizer(folder)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_transformers(pair, text, add_special_tokens):
    ours, theirs = pair
    assert ours.encode(text, add_special_tokens) == theirs.encode(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_equals_transformers(pair, text, skip):
    ours, theirs = pair
    ids = theirs.encode(text)
    expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, skip) == expected


def test_special_tokens_equal_transformers(pair):
    ours, theirs = pair
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_id, ours.pad_id, ours.unk_id) == (
        theirs.bos_token_id,
        theirs.pad_token_id,
        theirs.unk_token_id,
    )
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert set(theirs.all_special_ids) <= ours.special_ids


def test_shipped_model():
    ours, theirs = Tokenizer.from_folder(SHIPPED), auto_tokenizer(SHIPPED)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.vocab_size, ours.eos_ids, ours.bos_id, ours.pad_id) == (4096, {2, 6}, 1, 0)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_saved_by_transformers_and_read_again(tmp_path):
    """The layout newer transformers write: template beside the config, specials in the config."""
    source = tmp_path / "source"
    source.mkdir()
    theirs = auto_tokenizer(write("llama3", source))
    theirs.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer.from_folder(tmp_path / "saved")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_templates == {"default": theirs.chat_template}
    assert ours.eos_ids == {theirs.eos_token_id}


def test_tokens_only_the_config_knows(tmp_path):
    folder = write("llama3", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = Tokenizer.from_folder(folder).vocab_size
    config["added_tokens_decoder"] = {
        str(size + 1): {"content": "<tool>", "special": False, "normalized": False},
        str(size): {"content": "<think>", "special": True, "normalized": False},
    }
    config["pad_token"] = "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_folder(folder), auto_tokenizer(folder)
    for text in ["a<think>b<tool>c<pad>", *TEXTS]:
        assert ours.encode(text) == theirs.encode(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.pad_id == theirs.pad_token_id == size + 2


def test_special_tokens_map_of_older_checkpoints(tmp_path):
    folder = write("llama3", tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
    )
    ours, theirs = Tokenizer.from_folder(folder), auto_tokenizer(folder)
    assert ours.special_tokens == theirs.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.eos_ids == {theirs.eos_token_id}


def test_end_tokens_are_the_union_of_all_sources(tmp_path):
    folder = write("llama3", tmp_path)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [3, 4], "vocab_size": 1000}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_ids == {3, 4, 9, tokenizer.token_to_id("<|end|>")}


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path):
    folder = write("llama3", tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert len(Tokenizer.from_folder(folder).encode("Once upon a time there was")) > 3


def test_vocabulary_larger_than_the_model(tmp_path):
    folder = write("llama3", tmp_path)
    size = Tokenizer.from_folder(folder).vocab_size
    Tokenizer.from_folder(folder, vocab_size=size)
    with pytest.raises(CheckpointError, match=rf"token 'ｗide' has id {size - 1}.*vocab_size is {size - 1}"):
        Tokenizer.from_folder(folder, vocab_size=size - 1)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100}))
    with pytest.raises(CheckpointError, match="does not match the model"):
        Tokenizer.from_folder(folder)


def test_end_token_outside_the_model(tmp_path):
    folder = write("llama3", tmp_path)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000, "eos_token_id": 1000}))
    with pytest.raises(CheckpointError, match="eos_token_id 1000 is outside"):
        Tokenizer.from_folder(folder)


def test_no_tokenizer_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "vocab_size": 10}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert not tokenizer.available
    assert tokenizer.eos_ids == {2}
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
        with pytest.raises(RequestError, match=r"no tokenizer\.json.*token ids"):
            use()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "nonsense"])
def test_broken_files_are_named(tmp_path, name, content):
    folder = write("llama3", tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(folder)


def test_wrong_kinds_of_values_are_named(tmp_path):
    folder = write("llama3", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "two"}))
    with pytest.raises(CheckpointError, match=r"eos_token_id in .*generation_config\.json is 'two'"):
        Tokenizer.from_folder(folder)
    with pytest.raises(CheckpointError, match="not a folder"):
        Tokenizer.from_folder(tmp_path / "absent")


def test_half_a_surrogate_is_a_clear_error(tmp_path):
    with pytest.raises(RequestError, match="not valid Unicode"):
        Tokenizer.from_folder(write("llama3", tmp_path)).encode("a\ud800b")


def test_ids_outside_the_vocabulary_stand_for_nothing(tmp_path):
    tokenizer = Tokenizer.from_folder(write("llama3", tmp_path))
    ids = tokenizer.encode("word")
    assert tokenizer.decode([*ids, 10**6]) == "word"


def test_copies_and_pickles(tmp_path):
    tokenizer = Tokenizer.from_folder(write("llama3", tmp_path))
    tokenizer.chat_templates = {"default": "{{ messages[0].content }}"}
    messages = [{"role": "user", "content": "x"}]
    tokenizer.apply_chat_template(messages)
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.encode("Once upon") == tokenizer.encode("Once upon")
        assert twin.apply_chat_template(messages) == "x"


def test_importing_loads_neither_tokenizers_nor_jinja():
    code = (
        "import sys, trimtab.models.tokenizer, trimtab.models.detokenizer, trimtab.models.chat_template;"
        "heavy = {'tokenizers', 'jinja2', 'torch', 'transformers'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
