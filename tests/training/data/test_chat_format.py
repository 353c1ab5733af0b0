import dataclasses

import numpy as np
import pytest

from training.data.small import CHAT, tokenizer
from trimtab.errors import ConfigError
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.chat_format import Conversation, conversation_segment, mark_conversation
from trimtab.training.data.encoding import Marked, encode
from trimtab.training.data.formats import ChatFormat, CompletionFormat, LabelledFormat, fit
from trimtab.training.data.records import BadRecord, conversation
from trimtab.training.data.segments import Segment

TAGGED = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}
<|assistant|>{% generation %}
    {{- m['content'] }}<|end|>
    {% endgeneration %}
    {%- else %}
<|{{ m['role'] }}|>{{ m['content'] }}<|end|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
"""


def with_template(template):
    plain = tokenizer()
    return Tokenizer(plain.backend, special_tokens=plain.special_tokens, chat_templates={"default": template})


def trained_text(segment, tok=None):
    ids = [int(t) for t, on in zip(segment.tokens, segment.trained, strict=True) if on]
    return (tok or tokenizer()).decode(ids, skip_special_tokens=False)


def test_answers_are_marked_with_the_token_that_ends_them():
    tok = tokenizer()
    segment = conversation_segment(tok, CHAT)
    whole = "<|bos|><|user|>What is 1 + 2?<|end|><|assistant|>3<|end|><|user|>Write it:<|end|><|assistant|>"
    assert tok.decode(segment.tokens, skip_special_tokens=False) == whole + "    return three<|end|>"
    assert trained_text(segment) == "3<|end|>    return three<|end|>"
    assert trained_text(conversation_segment(tok, CHAT, "last")) == "    return three<|end|>"
    assert conversation_segment(tok, CHAT, "all").trained.all()


def test_generation_tags_say_what_is_learnt_and_leave_the_text_alone():
    tok = with_template(TAGGED)
    segment = conversation_segment(tok, CHAT)
    text = tok.apply_chat_template(CHAT, add_generation_prompt=False)
    assert tok.decode(segment.tokens, skip_special_tokens=False) == text
    marked = mark_conversation(tok, Conversation(CHAT))
    assert [text[a:b] for a, b in marked.spans or ()] == ["3<|end|>\n", "    return three<|end|>\n"]
    # Messages of the prompt are given, not learnt.
    later = mark_conversation(tok, Conversation(CHAT, prompt=2))
    assert later.spans == (marked.spans or ())[1:]
    with pytest.raises(ConfigError, match=r"U\+F8F3"):
        mark_conversation(tok, Conversation([*CHAT[:3], {"role": "assistant", "content": "\uf8f3\uf8f4"}]))


def test_tokens_of_spaces_are_learnt_also_where_offsets_leave_spaces_out():
    trimmed = Tokenizer(tokenizer().backend, special_tokens=tokenizer().special_tokens)
    text = "x    y"
    ends = len(text)

    class Encoded:
        ids = (5, 6, 7)
        offsets = ((0, 1), (4, 4), (5, 6))  # x, three spaces, space and y: as GPT-2's and Llama 3's say it

    class Backend:
        def encode_batch(self, texts, add_special_tokens):
            return [Encoded]

    trimmed._backend = Backend()  # type: ignore[assignment]
    assert encode(trimmed, [Marked(text, ((1, ends),))])[0].trained.tolist() == [False, True, True]


def test_templates_that_do_not_let_answers_be_told_apart_are_refused():
    last_only = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}|{% endif %}"
        "{% endfor %}"
    )
    tok = with_template(last_only)
    with pytest.raises(ConfigError, match="train_on: all"):
        conversation_segment(tok, CHAT)
    assert conversation_segment(tok, CHAT, "all").trained.all()
    with pytest.raises(ConfigError, match="no message with the role 'assistant'"):
        conversation_segment(tok, CHAT[:1])


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": "3"}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"prompt": CHAT[0]["content"], "completion": "3"},
        {"instruction": CHAT[0]["content"], "input": "", "output": "3"},
        {"chat": CHAT, "messages": None},
    ],
)
def test_layouts_of_others_become_messages(record):
    found = conversation(record, "chat" if "chat" in record else None)
    assert list(found.messages)[:2] == CHAT[:2]


def test_alpaca_history_input_and_system_and_sharegpt_system():
    record = {
        "instruction": "Add",
        "input": "1, 2",
        "output": "3",
        "system": "Be brief",
        "history": [["a", "b"]],
    }
    assert [m["content"] for m in conversation(record).messages] == ["Be brief", "a", "b", "Add\n1, 2", "3"]
    share = {"system": "Be brief", "conversations": [{"from": "system", "value": "x"}]}
    assert [m["role"] for m in conversation(share).messages] == ["system", "system"]
    marked = ChatFormat().read({"prompt": CHAT[:3], "completion": CHAT[3:]}, tokenizer())
    assert len(marked.spans or ()) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chat": []}, "no 'messages' .there is 'chat'."),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": ["hello"]}, "holds a str where a message should be"),
        ({"messages": [{"content": "x"}]}, "has no 'role'"),
        ({"messages": [{"role": "user"}]}, "has no 'content'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
        ({"instruction": "Add"}, "no 'output'"),
        ({"prompt": "Add"}, "no 'completion'"),
    ],
)
def test_records_of_no_layout_are_named(record, message):
    with pytest.raises(BadRecord, match=message):
        conversation(record)


def test_completions_are_learnt_after_their_prompts():
    tok = tokenizer()
    form = CompletionFormat(first=tok.bos_id, last=tok.token_to_id("<|eos|>"))
    read = form.read({"prompt": "The quick brown", "completion": " fox jumps"}, tok)
    segment = encode(tok, [read])[0]
    assert tok.decode(segment.tokens, skip_special_tokens=False) == "<|bos|>The quick brown fox jumps<|eos|>"
    assert trained_text(segment) == " fox jumps<|eos|>"
    alpaca = form.read({"instruction": "Add", "input": "1, 2", "output": "3"}, tok)
    assert alpaca.text.endswith("### Instruction:\nAdd\n\n### Input:\n1, 2\n\n### Response:\n3")
    everything = dataclasses.replace(form, train_on="all").read({"prompt": "a", "completion": "b"}, tok)
    assert encode(tok, [everything])[0].trained.tolist()[1:] == [True] * 3


def test_labels_are_numbers_or_names():
    form = LabelledFormat(labels=("bad", "good"))
    assert form.read({"text": "x", "label": "good"}, tokenizer()).label == 1
    assert LabelledFormat().read({"text": "x", "label": 7}, tokenizer()).label == 7
    for wrong in ("fine", 2, -1):
        with pytest.raises(BadRecord, match="not one of bad, good"):
            form.read({"text": "x", "label": wrong}, tokenizer())
    with pytest.raises(BadRecord, match=r"no 'label' \(there is 'text'\)"):
        form.read({"text": "x"}, tokenizer())


def test_longer_texts_are_dropped_or_cut_at_either_end():
    segment = Segment(np.arange(10), np.arange(10) >= 6)
    assert fit(segment, 10, "drop", 0) is segment and fit(segment, 9, "drop", 0) is None
    left = fit(segment, 4, "cut_left", first=0)
    assert left is not None and left.tokens.tolist() == [0, 7, 8, 9]
    assert fit(segment, 4, "cut_left", first=None).tokens.tolist() == [6, 7, 8, 9]  # type: ignore[union-attr]
    right = fit(segment, 8, "cut_right", 0)
    assert right is not None and right.tokens.tolist() == list(range(8)) and right.trained.sum() == 2
    assert fit(segment, 6, "cut_right", 0) is None  # nothing to learn is left


@pytest.mark.slow
@pytest.mark.parametrize("trim", [False, True])
def test_masks_equal_those_of_transformers(trim):
    """transformers.apply_chat_template(return_assistant_tokens_mask=True) on a template with tags.

    Where offsets leave spaces out, transformers loses an answer that begins with spaces; we do not.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer().backend).from_str(tokenizer().backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    ours = Tokenizer(backend, special_tokens=tokenizer().special_tokens, chat_templates={"default": TAGGED})
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", chat_template=TAGGED
    )
    code = "def solve(x):\n    return x - 1"
    user = {"role": "user", "content": "naïve 你好"}
    chats = [
        CHAT[:3] + [{"role": "assistant", "content": code}],
        [{"role": "system", "content": "Be brief."}, *CHAT[:2]],
        [user, {"role": "assistant", "content": "a\n\n  space 🎉 "}],
    ]
    chats += [] if trim else [CHAT]
    for chat in chats:
        expected = theirs.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        segment = conversation_segment(ours, chat)
        assert segment.tokens.tolist() == expected["input_ids"]
        assert segment.trained.astype(int).tolist() == expected["assistant_masks"]
