import math
from pathlib import Path

import pytest
import torch

from models.tokenizer_zoo import write
from training.data.small import tokenizer
from trimtab.errors import ConfigError
from trimtab.models.checkpoint import load
from trimtab.models.save import save
from trimtab.models.shapes import random_model, shape
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.batch import pack
from trimtab.training.data.segments import all_trained
from trimtab.training.data.text_bytes import text_bytes
from trimtab.training.objectives.lm import LanguageModelling
from trimtab.training.starting.tokenizers.replace import replace_tokenizer
from trimtab.training.starting.tokenizers.train import TokenizerSettings, train_tokenizer

SHARED = Path(__file__).parents[3] / "../shared"
OTHER = "De snelle bruine vos springt over de luie hond, een koe en 你好. " * 4
SETTINGS = TokenizerSettings(330, bos="<s>", eos="</s>", pad="<p>", others=("<|end|>", "<|new|>"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "texts.txt").write_text(OTHER, encoding="utf-8")
    return train_tokenizer(["texts.txt"], folder / "made", SETTINGS, root=folder)


def small_model(old=None, tied=False):
    old = old or tokenizer()
    config = shape(
        "125m",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=old.vocab_size,
        tie_word_embeddings=tied,
        eos_token_id=[2, 6],
        pad_token_id=0,
    )
    model = random_model(config)
    model.tokenizer = old
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_rows_begin_from_the_old_tokens_of_their_text(other, tied):
    model, old = small_model(tied=tied), tokenizer()
    made = replace_tokenizer(model, other)
    pairs = [(model.model.embed_tokens.weight, made.model.embed_tokens.weight)]
    if not tied:
        pairs.append((model.lm_head.weight, made.lm_head.weight))
    overlap = 0
    for before, after in pairs:
        assert after.shape == (other.vocab_size, 32)
        # Special tokens by role, else by name; a new one is the mean of all.
        for now, then in ((other.bos_id, old.bos_id), (2, 2), (0, 0), (other.token_to_id("<|end|>"), 6)):
            assert torch.equal(after[now], before[then])
        torch.testing.assert_close(after[other.token_to_id("<|new|>")], before.mean(0))
        for token_id in range(5, other.vocab_size):
            token = other.id_to_token(token_id)
            if (same := old.token_to_id(token)) is not None:
                overlap += 1
                assert torch.equal(after[token_id], before[same])
        word = other.token_to_id("Ġsnelle")
        pieces = old.encode(" snelle", add_special_tokens=False)
        assert word is not None and len(pieces) > 1
        torch.testing.assert_close(after[word], before[pieces].mean(0))
    assert overlap > 256
    assert made.model.layers[0].mlp.up_proj.weight is not None
    assert torch.equal(made.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_parts_of_characters_begin_from_their_bytes(other):
    model, old = small_model(), tokenizer()
    made = replace_tokenizer(model, other)
    parts = [i for i in range(other.vocab_size) if other.id_to_token(i) in ("ä½", "å¥", "ä½ł")]
    for token_id in parts:
        token = other.id_to_token(token_id)
        if old.token_to_id(token) is None:
            rows = model.model.embed_tokens.weight[[old.token_to_id(c) for c in token]]
            torch.testing.assert_close(made.model.embed_tokens.weight[token_id], rows.mean(0))


def test_mean_and_random_rows(other):
    model = small_model()
    old_rows = model.model.embed_tokens.weight
    mean = replace_tokenizer(model, other, "mean").model.embed_tokens.weight
    torch.testing.assert_close(mean[10:], old_rows.mean(0).expand(len(mean) - 10, -1))
    assert torch.equal(mean[other.bos_id], old_rows[1])
    drawn = replace_tokenizer(model, other, "random", seed=3).model.embed_tokens.weight
    assert torch.equal(drawn, replace_tokenizer(model, other, "random", seed=3).model.embed_tokens.weight)
    assert abs(drawn[10:].std() / old_rows.std() - 1) < 0.1
    with pytest.raises(ConfigError, match="'how' is 'magic'; it must be one of fvt, mean, random"):
        replace_tokenizer(model, other, "magic")  # type: ignore[arg-type]
    model.tokenizer = None
    with pytest.raises(ConfigError, match="the model's own one and the new one"):
        replace_tokenizer(model, other)


def test_the_saved_model_is_consistent(other, tmp_path):
    made = replace_tokenizer(small_model(), other)
    save(made, tmp_path / "model")
    again = load(tmp_path / "model", dtype="float32")
    assert again.config.vocab_size == other.vocab_size == again.tokenizer.vocab_size
    assert again.config.eos_token_ids == (2, other.token_to_id("<|end|>"))
    assert again.config.bos_token_id == other.bos_id and again.config.raw["pad_token_id"] == other.pad_id
    assert again.tokenizer.encode(OTHER) == other.encode(OTHER)
    ids = torch.tensor([other.encode(OTHER)])
    torch.testing.assert_close(again(ids), made(ids))


def test_a_sentence_piece_tokenizer_is_replaced_by_text_too(other, tmp_path):
    (tmp_path / "old").mkdir()
    old = Tokenizer.from_folder(write("llama2", tmp_path / "old"))
    model = small_model(old)
    made = replace_tokenizer(model, other)
    word = other.token_to_id("Ġde")
    pieces = old.encode("de", add_special_tokens=False)  # it puts the space before by itself
    torch.testing.assert_close(
        made.model.embed_tokens.weight[word], model.model.embed_tokens.weight[pieces].mean(0)
    )


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/base").is_dir(), reason="the shared models are not here")
def test_mapped_rows_begin_with_fewer_bits_a_byte_than_mean_or_random_ones(tmp_path):
    """ChocoLlama's finding, on a real model; transformers loads what comes out and computes the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "It was a dark night, and the old man was afraid of the sea. " * 3
    corpus = text + "Nobody knew the captain of the ship, who had come from the north.\n" * 20
    (tmp_path / "texts.txt").write_text(corpus, encoding="utf-8")
    new = train_tokenizer(["texts.txt"], tmp_path / "made", TokenizerSettings(600), root=tmp_path)
    model = load(SHARED / "models/base", dtype="float32")

    def bits(changed):
        segment = all_trained(torch.tensor(changed.tokenizer.encode(text)).numpy())
        with torch.no_grad():
            loss = LanguageModelling().loss_sum(changed, pack([segment])).item()
        return loss / math.log(2) / text_bytes(changed.tokenizer, [segment])

    found = {how: bits(replace_tokenizer(model, new, how)) for how in ("fvt", "mean", "random")}
    assert found["fvt"] < 0.8 * min(found["mean"], found["random"]), found

    save(replace_tokenizer(model, new), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(text, return_tensors="pt")["input_ids"]
    ours = load(tmp_path / "model", dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
