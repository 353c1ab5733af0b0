"""Chat templates in the style of the families, string for string against transformers."""

import datetime
import json
from pathlib import Path

import pytest

from models.chat_templates import CHATS, TEMPLATES, TOOLS
from models.tokenizer_zoo import write
from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = write("llama3", tmp_path_factory.mktemp("chat"))
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def both(pair, template: str, messages, **kwargs) -> tuple[str, str]:
    """Our text and transformers', or "refused" where one raises."""
    ours, theirs = pair
    kwargs.setdefault("add_generation_prompt", True)
    try:
        expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
    except Exception:  # whatever a template raises
        expected = "refused"
    try:
        text = ours.apply_chat_template(messages, chat_template=template, **kwargs)
    except RequestError:
        text = "refused"
    return text, expected


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_families_equal_transformers(pair, family, chat, with_tools, add_generation_prompt):
    tools = TOOLS if with_tools else None
    text, expected = both(
        pair, TEMPLATES[family], CHATS[chat], tools=tools, add_generation_prompt=add_generation_prompt
    )
    assert text == expected


def test_most_family_and_chat_pairs_render(pair):
    """The comparison above would mean little if both sides refused everything."""
    rendered = [
        both(pair, template, chat)[0] != "refused"
        for template in TEMPLATES.values()
        for chat in CHATS.values()
    ]
    assert sum(rendered) > 0.7 * len(rendered)


SNIPPETS = {
    "json": "{{ messages | tojson }}",
    "json indent": "{{ messages | tojson(indent=2) }}",
    "json ascii": "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}",
    "json separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "trimmed blocks": "a\n  {% if true %}\n  b\n  {% endif %}\nc {{- ' d ' -}} \n e",
    "break and continue": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "generation tag": "{% for m in messages %}{% generation %}\n{{ m.role }}{% endgeneration %}{% endfor %}",
    "generation tag with set": "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in [1, 2] %}{% set n.x = m %}{% endfor %}{{ n.x }}",
    "underscore in namespace": "{% set ns = namespace(_n=0) %}{{ ns }}",
    "dict": "{{ dict(a=1, b=[2]) | tojson }}{{ dict.fromkeys(['x'], 3) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token is defined }}",
    "arguments": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "macro": "{% macro f(x, y=2) %}<{{ x }}{{ y }}>{% endmacro %}{{ f(1) }}{{ f('a', y='b') }}",
    "raise": "{{ raise_exception('only one message, please') }}",
    "undefined attribute": "{{ messages[0].nothing.more }}",
    "undefined value": "[{{ nothing }}]",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "change a message": "{{ messages.append(1) }}",
    "filters": "{{ messages | map(attribute='content') | join('/') | upper | trim | replace('H', '_') }}",
    "html": "{{ '<b>&' | tojson }}{{ '<b>&' }}{{ '<b>' | e }}",
    "strings": "{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ 'abc'[::-1] }}{{ 'abc'.startswith('a') }}",
    "numbers": "{{ '-' * 3 }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ [0] * 2 }}",
    "odd syntax": "{% for m in messages %}",
    "unknown filter": "{{ messages | frobnicate }}",
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_every_feature_equals_transformers(pair, name):
    messages = [{"role": "user", "content": "hi <é> 你"}, {"role": "assistant", "content": "ho"}]
    text, expected = both(pair, SNIPPETS[name], messages)
    assert text == expected


def test_odd_messages_equal_transformers(pair):
    template = "{{ messages | tojson }}"
    chats = [
        [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
        [{"role": "assistant", "content": "x", "reasoning": "because"}],
        [{"role": "assistant", "content": "x", "thinking": "so", "reasoning_content": "why"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": object()}]}],
        [{"role": "user", "content": (1, 2.5, True, None)}],
    ]
    for chat in chats:
        text, expected = both(pair, template, chat)
        assert text == expected != "refused"


def test_variables_and_documents_equal_transformers(pair):
    template = "{{ enable_thinking }}{{ documents | tojson }}{{ bos_token }}"
    text, expected = both(
        pair,
        template,
        USER,
        enable_thinking=False,
        documents=[{"title": "t", "text": "x"}],
        bos_token="<other>",
    )
    assert text == expected == 'False[{"title": "t", "text": "x"}]<other>'


@pytest.mark.parametrize("content", ["The answer is", "The answer is ", "ends\n"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_continuing_the_last_message_equals_transformers(pair, family, content):
    chat = [*USER, {"role": "assistant", "content": content}]
    text, expected = both(
        pair, TEMPLATES[family], chat, continue_final_message=True, add_generation_prompt=False
    )
    assert text == expected != "refused"
    assert text.rstrip().endswith(content.rstrip())


def test_strftime_now(pair):
    text, _ = both(pair, "{{ strftime_now('%Y') }}", USER)
    assert abs(int(text) - datetime.datetime.now().year) <= 1


def test_named_templates(tmp_path):
    from transformers import AutoTokenizer

    folder = write("llama3", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
        {"name": "rag", "template": "{{ documents | length }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pair = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert both(pair, None, USER) == ("plain", "plain")
    assert both(pair, None, USER, tools=TOOLS) == ("with tools", "with tools")
    assert both(pair, "rag", USER, documents=[{"text": ""}]) == ("1", "1")
    with pytest.raises(RequestError, match=r"no chat template called 'ragg'\. Did you mean 'rag'"):
        pair[0].apply_chat_template(USER, chat_template="ragg")
    del pair[0].chat_templates["default"]
    fresh = Tokenizer(pair[0].backend, chat_templates=pair[0].chat_templates)
    with pytest.raises(RequestError, match="rag, tool_use"):
        fresh.apply_chat_template(USER)


def test_template_files_win(tmp_path):
    from transformers import AutoTokenizer

    folder = write("llama3", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "config"}))
    (folder / "chat_template.jinja").write_text("file {{ messages | length }}\n", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    pair = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert both(pair, None, USER) == ("file 1", "file 1")
    assert both(pair, "rag", USER) == ("rag", "rag")


def refusal(tmp_path: Path, template: str | None, messages=USER, **kwargs) -> str:
    tokenizer = Tokenizer.from_folder(write("llama3", tmp_path))
    tokenizer.chat_templates = {} if template is None else {"default": template}
    with pytest.raises(RequestError) as error:
        tokenizer.apply_chat_template(messages, **kwargs)
    return str(error.value)


def test_no_template_names_the_fix(tmp_path):
    message = refusal(tmp_path, None)
    assert "no chat template" in message and "chat_template.jinja" in message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("line\n{% for m in %}", "malformed, line 2"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "loops take more than",
        ),
        ("{{ 'x' * 10000000000 }}", "repeated text"),
        ("{{ 9 ** 9999999999 }}", "power"),
        ("{{ ((9 ** 9000) ** 9000) ** 9000 }}", "power"),
        (
            "{% set s = 'x' * 1000000 %}{% for i in range(1000) %}{{ s }}{% endfor %}",
            "output is longer",
        ),
    ],
)
def test_templates_that_fail_or_do_not_end(tmp_path, template, words):
    assert words in refusal(tmp_path, template)


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, ["hi"]])
def test_messages_of_the_wrong_kind(tmp_path, messages):
    assert "message" in refusal(tmp_path, "x", messages)


def test_tools_of_the_wrong_kind(tmp_path):
    assert "tools must be a list of mappings" in refusal(tmp_path, "x", tools=[print])


def test_continuing_where_it_cannot(tmp_path):
    assert "no text to continue" in refusal(
        tmp_path, "{{ messages[0].content }}", [{"role": "user"}], continue_final_message=True
    )
    assert "does not print the last message" in refusal(
        tmp_path, "content", USER, continue_final_message=True
    )


def test_the_callers_messages_are_left_alone(tmp_path):
    tokenizer = Tokenizer.from_folder(write("llama3", tmp_path))
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    before = json.dumps(messages)
    tokenizer.apply_chat_template(
        messages, chat_template="{{ messages[0].content[0].text }}", continue_final_message=True
    )
    assert json.dumps(messages) == before
