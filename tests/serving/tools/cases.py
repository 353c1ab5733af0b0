"""Templates, tokenizers and tools for the tests of tool calling, and random answers under a constraint."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import numpy as np
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from models.chat_templates import LLAMA3, MISTRAL, QWEN25
from trimtab.models.hub import find_folder
from trimtab.models.tokenizer import Tokenizer
from trimtab.serving.tools import ToolPlan, prepare

QWEN_TEXT_ARGUMENTS = QWEN25.replace("call.arguments | tojson", "call.arguments")
PLAIN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
TEMPLATES = {"hermes": QWEN25, "llama3": LLAMA3, "mistral": MISTRAL, "generic": PLAIN}

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
PLACES = {
    "type": "object",
    "properties": {
        "points": {
            "type": "array",
            "maxItems": 2,
            "items": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
        "near": {"type": ["boolean", "null"]},
    },
    "required": ["points", "near"],
}


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    schema = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **schema, **more}}


TOOLS = [tool("get_weather", WEATHER, description="The weather."), tool("find-places", PLACES), tool("now")]
SCHEMAS = {"get_weather": WEATHER, "find-places": PLACES, "now": {"type": "object", "maxProperties": 0}}


@cache
def plain_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(find_folder(None))


@cache
def marked_tokenizer() -> Tokenizer:
    """The shipped one with the families' markers: some special tokens, some (as Qwen's) only added ones."""
    shipped = plain_tokenizer()
    backend = tokenizers.Tokenizer.from_str(shipped.backend.to_str())
    backend.add_special_tokens(["<|python_tag|>", "[TOOL_CALLS]"])
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(backend, special_tokens=shipped.special_tokens, eos_ids=shipped.eos_ids)


TOKENIZERS = {"plain": plain_tokenizer, "marked": marked_tokenizer}


@cache
def engine_tokenizer(kind: str) -> LLTokenizer:
    tokenizer = TOKENIZERS[kind]()
    return LLTokenizer(tokenizer.backend.to_str(), eos_token=sorted(tokenizer.eos_ids))


def plan_for(
    form: str, kind: str = "plain", choice: Any = None, parallel: Any = None, tools: Any = None
) -> ToolPlan:
    tools = TOOLS if tools is None else tools
    return prepare(tools, choice, parallel, TEMPLATES[form], TOKENIZERS[kind]())


def matcher(plan: ToolPlan, kind: str = "plain") -> LLMatcher:
    wish = plan.wish
    assert wish is not None
    grammar = wish.grammar or LLMatcher.grammar_from_json_schema(json.dumps(wish.json))
    found = LLMatcher(engine_tokenizer(kind), grammar)
    assert not found.is_error(), found.get_error()
    return found


def accepts(plan: ToolPlan, text: str, kind: str = "plain", ids: list[int] | None = None) -> bool:
    """Whether the constraint allows the text, to its end."""
    state = matcher(plan, kind)
    ids = TOKENIZERS[kind]().encode(text, add_special_tokens=False) if ids is None else ids
    return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()


@cache
def _closers(kind: str) -> frozenset[int]:
    """Tokens that begin like something that ends something."""
    tokenizer = TOKENIZERS[kind]()
    texts = ((i, tokenizer.decode([i], skip_special_tokens=False)) for i in range(tokenizer.vocab_size))
    return frozenset(i for i, text in texts if text.startswith(('"', "}", "]", "<", "[TOOL", "{")))


def walk(plan: ToolPlan, kind: str, seed: int, begin: str, limit: int = 300) -> tuple[str, str]:
    """A random answer that the constraint allows, and why it ended; decoded as the plan says."""
    rng = random.Random(seed)
    tokenizer, state = TOKENIZERS[kind](), matcher(plan, kind)
    ids = tokenizer.encode(begin, add_special_tokens=False)
    assert state.consume_tokens(ids)
    reason = "length"
    while len(ids) < limit:
        if state.is_stopped():
            reason = "stop"
            break
        mask = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        allowed = [i for i in allowed if i < tokenizer.vocab_size]
        assert allowed, state.get_error()
        near = [i for i in allowed if i in tokenizer.eos_ids or i in _closers(kind)]
        token = rng.choice(near if near and rng.random() < 0.5 else allowed)
        assert state.consume_token(token)
        ids.append(token)
        if token in tokenizer.eos_ids:
            reason = "stop"
            break
    return tokenizer.decode(ids, skip_special_tokens=plan.skip_special_tokens), reason
