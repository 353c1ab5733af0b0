import pytest

from models.chat_templates import LLAMA2, LLAMA3, MISTRAL, MIXTRAL, QWEN3, QWEN25
from serving.tools.cases import PLAIN, marked_tokenizer, plain_tokenizer
from trimtab.errors import ConfigError
from trimtab.serving.tools import FORMATS, template_source
from trimtab.serving.tools.formats import detect, format_called, shows_tools


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (QWEN25, "hermes"),
        (QWEN3, "hermes"),
        (LLAMA3, "llama3"),
        (MISTRAL, "mistral"),
        (LLAMA2, "generic"),
        (MIXTRAL, "generic"),
        (PLAIN, "generic"),
        # Relatives that write the call itself in another way.
        (QWEN25.replace("Call them", "<tool_call><function=name>"), "generic"),
        (MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS]f[ARGS]"), "generic"),
        ("{{ 'You have no <tool_call> and no tools' }}", "generic"),
        ("{% for tool in tools %}{{ tool }}{% endfor %}", "generic"),
    ],
)
def test_detect(source, name):
    assert detect(source).name == name


def test_a_named_format_wins():
    assert format_called("llama3", QWEN25).name == "llama3"
    assert format_called("generic", QWEN25).name == "generic"


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match=r"tool_format is 'hermess'.*'hermes'"):
        format_called("hermess", QWEN25)


def test_words_are_no_use_of_tools():
    assert shows_tools("{%- if tools %}x{% endif %}")
    assert not shows_tools("tools {{ messages[0].content }} tools")


def test_only_added_tokens_count_as_markers():
    # "[" and "," are single tokens of any vocabulary, and stand for themselves.
    assert set(FORMATS["mistral"].marker_ids(plain_tokenizer()).values()) == {None}
    marked = FORMATS["mistral"].marker_ids(marked_tokenizer())
    assert marked == {"[TOOL_CALLS]": 4096, "[": None, ",": None, "]": None} | {
        "[TOOL_CALLS]": marked_tokenizer().token_to_id("[TOOL_CALLS]")
    }


def test_the_source_is_the_one_for_tools():
    tokenizer = marked_tokenizer()
    tokenizer.chat_templates.update({"default": "D", "tool_use": "T"})
    try:
        assert template_source(tokenizer) == "T"
        assert template_source(tokenizer, with_tools=False) == "D"
        assert template_source(tokenizer, "{{ own }}") == "{{ own }}"
    finally:
        tokenizer.chat_templates.clear()
