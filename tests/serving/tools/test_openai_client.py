"""What the documentation shows, run with OpenAI's client against a server."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from openai import BadRequestError

DOCUMENT = Path(__file__).parents[3] / "docs/tools.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture
def shown(server):
    """The names that the first example leaves behind."""
    names: dict = {}
    exec(local(BLOCKS[0], server), names)
    yield names
    names["client"].close()


def local(code: str, server) -> str:
    return code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.port}").replace(
        'model="tiny",', 'model="tiny", max_tokens=400, seed=1,'
    )


def test_a_call_and_its_result(shown):
    schema = shown["tools"][0]["function"]["parameters"]
    assert shown["call"].function.name == "get_weather"
    jsonschema.validate(shown["arguments"], schema)
    assert shown["message"].content is None
    answer = shown["answer"].choices[0]
    assert answer.message.tool_calls is None
    assert answer.finish_reason in ("stop", "length")


def test_in_a_stream(shown, server):
    exec(local(BLOCKS[1], server).replace('tool_choice="auto"', 'tool_choice="required"'), shown)
    assert set(shown["names"].values()) == {"get_weather"}
    assert shown["arguments"].keys() == shown["names"].keys()
    for text in list(shown["arguments"].values())[:-1]:  # the last may be cut off
        jsonschema.validate(json.loads(text), shown["tools"][0]["function"]["parameters"])


def test_a_named_function_ends_with_stop(shown):
    answer = shown["client"].chat.completions.create(
        model="tiny",
        messages=shown["messages"][:1],
        tools=shown["tools"],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert [call.function.name for call in choice.message.tool_calls or ()] == ["get_weather"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "required"}, "tool_choice is 'required', but the request has no tools"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls is True, but the request has no tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "list"}}}]},
            "of 'f' is not a valid JSON schema",
        ),
    ],
)
def test_mistakes_are_400(client, more, message):
    with pytest.raises(BadRequestError, match=message):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], **more)
