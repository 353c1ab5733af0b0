"""`trimtab generate`: continue a prompt, streaming the text to stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import common
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab import Engine, SamplingParams
    from trimtab.engine.request import RequestMetrics

MAX_TOKENS = 128


def run(
    first: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder, hub id, or a shipped model's name. Default: tiny.",
            show_default=False,
        ),
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to continue; '-' or a pipe: read it from stdin.", show_default=False
        ),
    ] = None,
    plan: common.PlanOption = None,
    adapter: common.AdapterOption = None,
    weights: common.WeightsOption = None,
    cache: common.CacheOption = None,
    dtype: common.DtypeOption = None,
    device: common.DeviceOption = None,
    threads: common.ThreadsOption = None,
    kv_memory: common.KvMemoryOption = None,
    backend: common.BackendOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt to the model as a user's turn of a chat.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System message; needs --chat.", metavar="TEXT", show_default=False)
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before the continuation.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")] = MAX_TOKENS,
    min_tokens: Annotated[int, typer.Option(metavar="N", help="Do not end before that many tokens.")] = 0,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(metavar="P", help="Keep tokens that together hold P.")] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Keep tokens at least P times as likely as the likeliest.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Same seed, same tokens.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", help="How many completions.")] = 1,
    best_of: Annotated[
        int | None,
        typer.Option(metavar="N", help="Make N completions, keep the likeliest.", show_default=False),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be repeated.", show_default=False),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="End at this token; may be repeated.", show_default=False),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end tokens.")
    ] = False,
    presence_penalty: Annotated[float, typer.Option(metavar="X", help="-2 to 2.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(metavar="X", help="-2 to 2.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(metavar="X", help="1 is off.")] = 1.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Add to a token's logit; may be repeated.", show_default=False),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Report the N likeliest tokens; needs --json.", show_default=False),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(metavar="N", help="The same for the prompt; needs --json.", show_default=False),
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(metavar="JSON|FILE", help="Write JSON that matches this schema.", show_default=False),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Write a text that the pattern matches.", show_default=False),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option(metavar="LARK|FILE", help="Write a text of this grammar.", show_default=False),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Write one of these; may be repeated.", show_default=False),
    ] = None,
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Show special tokens in the text.")
    ] = False,
    as_json: common.JsonOption = False,
) -> None:
    """Continue a prompt. The text streams to stdout, a line of measurements follows on stderr.

    \b
    Examples:
      trimtab generate "Once upon a time"
      trimtab generate --chat "Write as JSON: In Oslo lives Paul Fox, a tailor aged 81."
      trimtab generate --chat "Who are you?" --json-schema '{"type": "object"}'
      trimtab generate ./my-model "def fib(n):" --cache kivi:bits=2 --temperature 0
      cat notes.txt | trimtab generate ./my-model - --json
    """
    model, prompt = _model_and_prompt(first, second)
    _needs("--json", as_json, {"--logprobs": logprobs, "--prompt-logprobs": prompt_logprobs})
    _needs("--chat", chat, {"--system": system})
    chosen = common.make_plan(
        plan,
        model,
        adapter=adapter,
        weights=weights,
        cache=cache,
        dtype=dtype,
        device=device,
        threads=threads,
        kv_memory=kv_memory,
        backend=backend,
    )

    from trimtab import SamplingParams

    params = SamplingParams(
        n=n,
        best_of=best_of,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=stop,
        stop_token_ids=stop_token_id,
        ignore_eos=ignore_eos,
        seed=seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_biases(logit_bias or []),
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        skip_special_tokens=not keep_special_tokens,
        structured_outputs=_form(json=json_schema, regex=regex, grammar=grammar, choice=choice),
    )
    engine = common.make_engine(chosen)
    asked = _as_chat(engine, prompt, system) if chat else prompt
    if as_json:
        common.write_json(_record(engine, prompt, asked, params))
        return
    if echo:
        print(prompt, end="", flush=True)
    one = params.num_samples == 1
    common.note(describe([_stream(engine, asked, params)] if one else _print_all(engine, asked, params)))


def _model_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str]:
    """One word alone is the prompt, unless it is a model's folder; then stdin holds the prompt."""
    if second is None:
        alone_is_model = first is not None and common.is_model_folder(first)
        first, second = (first, "-") if alone_is_model else (None, first or "-")
    if second != "-":
        return first, second
    if not common.is_piped():
        raise ConfigError('a prompt is missing; write trimtab generate [MODEL] "your prompt", or pipe it in')
    return first, common.read_stdin()


def _needs(needed: str, present: bool, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None and not present:
            raise ConfigError(f"{option} has no effect without {needed}; add {needed}")


def _form(**asked: Any) -> dict[str, Any] | None:
    """What the text must look like, as `SamplingParams` takes it; schemas and grammars may be files."""
    given = {name: value for name, value in asked.items() if value}
    for name in ("json", "grammar"):
        if name in given and common.is_file(given[name]):
            given[name] = Path(given[name]).read_text(encoding="utf-8")
    return given or None


def _biases(pairs: list[str]) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    for pair in pairs:
        key, value = common.split_pair(pair, "--logit-bias")
        try:
            biases[int(key)] = float(value)
        except ValueError:
            raise ConfigError(f"--logit-bias is {pair!r}; write TOKEN_ID=BIAS, for example 42=-5") from None
    return biases or None


def _as_chat(engine: Engine, prompt: str, system: str | None) -> list[int]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    tokenizer = common.tokenizer_of(engine)
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def _stream(engine: Engine, prompt: str | list[int], params: SamplingParams) -> RequestMetrics:
    metrics = None
    for piece in engine.stream(prompt, params):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        metrics = piece.metrics
    print(flush=True)
    assert metrics is not None, "the last piece of a stream carries the metrics"
    return metrics


def _print_all(engine: Engine, prompt: str | list[int], params: SamplingParams) -> list[RequestMetrics]:
    output = engine.generate(prompt, params)[0]
    for number, completion in enumerate(output.outputs, 1):
        if len(output.outputs) > 1:
            print(f"[{number}]", end=" ")
        print(completion.text, flush=True)
    return [completion.metrics for completion in output.outputs]


def _record(engine: Engine, prompt: str, asked: str | list[int], params: SamplingParams) -> dict[str, Any]:
    output = engine.generate(asked, params)[0]
    outputs = []
    for completion in output.outputs:
        metrics = {**common.plain(completion.metrics), "tokens_per_s": completion.metrics.tokens_per_s}
        del metrics["arrival"]  # a reading of this process's clock; all other times count from it
        outputs.append({**common.plain(completion), "metrics": metrics})
    return {
        "plan": engine.plan.to_dict(),
        "backend": engine.backend,
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": output.prompt_logprobs,
        "outputs": outputs,
    }


def describe(finished: Sequence[RequestMetrics]) -> str:
    """One line about finished requests of one prompt."""
    from trimtab.sizes import format_bytes

    first = finished[0]
    count = sum(metrics.completion_tokens for metrics in finished)
    words = [f"{count} {'token' if count == 1 else 'tokens'}"]
    if len(finished) > 1:
        words[0] += f" in {len(finished)} completions"
    elif first.tokens_per_s is not None:
        words[0] += f" at {first.tokens_per_s:.0f} tokens/s"
    if first.ttft_s is not None:
        words.append(f"first after {first.ttft_s:.2f} s")
    cached = f" ({first.cached_prompt_tokens} cached)" if first.cached_prompt_tokens else ""
    words.append(f"prompt of {first.prompt_tokens}{cached}")
    words.append(f"KV cache {format_bytes(sum(metrics.kv_bytes_held for metrics in finished))}")
    return ", ".join(words)
