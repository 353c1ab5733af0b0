import pytest

from serving.tools.cases import TOOLS, WEATHER, tool
from trimtab.errors import RequestError
from trimtab.serving.tools.definitions import read_choice, read_tools


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "tools must be a list of at least one tool"),
        ("f", "tools must be a list"),
        ([tool(f"f{i}") for i in range(129)], "tools has 129 entries; at most 128"),
        (["f"], r"tools\[0\] is 'f'; it must be an object"),
        ([{"type": "browser"}], r"tools\[0\].type is 'browser'; only 'function'"),
        ([{"type": "function"}], r"tools\[0\].function is None; it must be an object"),
        ([{**tool("f"), "cache": 1}], r"tools\[0\] has no field 'cache'"),
        ([tool("f", paramters={})], r"no field 'paramters'. Did you mean 'parameters'"),
        ([tool("f"), tool("a b")], r"tools\[1\].function.name is 'a b'; it must be 1 to 64 letters"),
        ([tool("f\n")], r"name is 'f\\n'"),
        ([tool("f" * 65)], "1 to 64 letters"),
        ([tool("f", description=3)], "description is 3; it must be a text"),
        ([tool("f", strict="yes")], "strict is 'yes'; it must be true or false"),
        ([tool("f"), tool("g"), tool("f")], r"tools\[2\] has the name 'f' of tools\[0\]"),
        ([tool("f", [1])], r"parameters is \[1\]; it must be a JSON schema"),
        ([tool("f", {"type": "objekt"})], r"parameters\['type'\] of 'f' is not a valid JSON schema.*objekt"),
        ([tool("f", {"properties": {"a": 3}})], r"parameters\['properties'\]\['a'\] of 'f'"),
        ([tool("f", {"type": "array"})], "has the type 'array'; arguments are an 'object'"),
    ],
)
def test_wrong_tools(tools, message):
    with pytest.raises(RequestError, match=message):
        read_tools(tools)


def test_a_schema_nested_too_deeply():
    schema: dict = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested too deeply"):
        read_tools([tool("f", {"properties": {"a": schema}})])


def test_what_is_read():
    weather, places, now = read_tools(TOOLS)
    assert weather.schema == WEATHER
    assert weather.shown() == TOOLS[0]
    assert now.schema == {"type": "object", "properties": {}, "additionalProperties": False}
    assert now.shown()["function"]["parameters"] == now.schema
    assert not places.strict
    assert read_tools([tool("f", {"properties": {}})])[0].schema["type"] == "object"


@pytest.mark.parametrize(
    ("choice", "kind", "names"),
    [
        (None, "auto", 3),
        ("auto", "auto", 3),
        ("none", "none", 3),
        ("required", "required", 3),
        (named("now"), "named", 1),
    ],
)
def test_choices(choice, kind, names):
    got = read_choice(choice, read_tools(TOOLS))
    assert (got.kind, len(got.functions)) == (kind, names)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice is 'any'; it must be 'none', 'auto', 'required' or"),
        (named("nows"), "tool_choice names 'nows', which is not in tools. Did you mean 'now'"),
        ({"type": "function", "name": "now"}, "a chosen function is"),
        ({"type": "function", "function": {"name": "now", "x": 1}}, "a chosen function is"),
        (3, "tool_choice is 3"),
    ],
)
def test_wrong_choices(choice, message):
    with pytest.raises(RequestError, match=message):
        read_choice(choice, read_tools(TOOLS))


def test_a_choice_needs_tools():
    assert read_choice(None, ()).kind == "none"
    assert read_choice("none", ()).kind == "none"
    for choice in ("auto", "required", named("now")):
        with pytest.raises(RequestError, match="no tools; give tools as well"):
            read_choice(choice, ())
