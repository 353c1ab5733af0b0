"""Wishes for a text's form become constraints for one tokenizer, with a time-out and a cache."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotReady
from typing import TYPE_CHECKING

from trimtab.decoding.constraints.base import Constraint, StructuredOutputs
from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CHARACTERS = 1_000_000
AT_ONCE = 4


class Compiler:
    """Compiles wishes for a checkpoint's tokenizer. Safe to use from many threads.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: width of the model's logits, at least the tokenizer's vocabulary.
        eos_ids: tokens that end a text.
        cache_size: how many constraints are kept, the least recently used leave first.

    llguidance and jsonschema are imported with the first wish only.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int], *, cache_size: int = 256
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Future[Constraint]] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._places = threading.Semaphore(AT_ONCE)
        self._read: LLTokenizer | None = None

    def compile(self, wish: StructuredOutputs, *, timeout_s: float = 10) -> Constraint:
        """The constraint for `wish`; equal wishes share one.

        Raises RequestError, in one sentence that names the field or keyword, for what cannot be kept and for
        what is not compiled within `timeout_s` seconds. The work on such a wish is bounded by llguidance's
        limits and goes on; asking again waits for it, and starts nothing anew.
        """
        key = wish.key
        if len(key) > MAX_CHARACTERS:
            raise RequestError(
                f"structured_outputs.{wish.kind} is {len(key):,} characters long; at most "
                f"{MAX_CHARACTERS:,} can be compiled"
            )
        _check_characters(wish)
        with self._lock:
            future = self._cache.get(key)
            if future is None:
                future = self._cache[key] = Future()
                if len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
                threading.Thread(target=self._work, args=(wish, future), daemon=True).start()
            self._cache.move_to_end(key)
        try:
            return future.result(timeout_s)
        except NotReady:
            raise RequestError(
                f"structured_outputs.{wish.kind} takes more than {timeout_s:g} s to compile; make it simpler"
            ) from None

    def _work(self, wish: StructuredOutputs, future: Future[Constraint]) -> None:
        with self._places:
            try:
                future.set_result(self._build(wish))
            except RecursionError:
                future.set_exception(RequestError(f"structured_outputs.{wish.kind} is nested too deep"))
            except BaseException as error:
                future.set_exception(error)

    def _build(self, wish: StructuredOutputs) -> Constraint:
        from trimtab.decoding.constraints import guidance

        with self._reading:
            if self._read is None:
                self._read = guidance.read_tokenizer(self._tokenizer, self._vocab_size, self._eos_ids)
        strips = guidance.strips_a_space(self._tokenizer)
        if wish.kind in ("json", "json_object"):
            from trimtab.decoding.constraints.json_schema import compile_schema

            compiled = compile_schema(
                {"type": "object"} if wish.kind == "json_object" else wish.json,
                self._read,
                compact=wish.disable_any_whitespace,
                wrap=(lambda grammar: _after_space(grammar, '" "?')) if strips else None,
            )
            matcher, check, notes, rung = compiled.matcher, compiled.check, compiled.notes, compiled.rung
        else:
            text = json.dumps({"grammars": [{"lark_grammar": _lark(wish)}]})
            if strips:
                text = _after_space(text, '" "')
            matcher, problem = guidance.match(text, self._read)
            if problem:
                said = guidance.first_line(problem)
                raise RequestError(f"structured_outputs.{wish.kind} {_shown(wish)}cannot be used: {said}")
            check, notes, rung = None, (), "exact"
        constraint = guidance.GuidanceConstraint(matcher, self._eos_ids, check=check, notes=notes, rung=rung)
        constraint.warm(self._vocab_size)
        return constraint


def _check_characters(wish: StructuredOutputs) -> None:
    """Refuse what Python takes for text and numbers but Unicode and JSON do not."""
    field = f"structured_outputs.{wish.kind}"
    try:
        json.dumps(getattr(wish, wish.kind), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RequestError(f"{field} is not valid Unicode (it holds half a surrogate pair)") from None
    except ValueError:
        raise RequestError(f"{field} holds a number that JSON does not have (NaN or infinity)") from None


def _lark(wish: StructuredOutputs) -> str:
    if wish.grammar is not None:
        return wish.grammar
    if wish.regex is not None:
        from llguidance import regex_to_lark

        # Shorthands are ASCII, as in JSON schema: nobody means all digits of all scripts by \d.
        return f"start: /{regex_to_lark(wish.regex, 'dws')}/"
    assert wish.choice is not None
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in wish.choice)


def _shown(wish: StructuredOutputs) -> str:
    return "" if wish.regex is None else f"{wish.regex[:80]!r} "


def _after_space(grammar: str, space: str) -> str:
    """A grammar after the space that reading a text takes away.

    `space`: whether it may be left out, as it may before JSON, which never begins with one.
    """
    inner = json.loads(grammar)["grammars"][0]
    return json.dumps({"grammars": [{"lark_grammar": f"start: {space} @text"}, {**inner, "name": "text"}]})
