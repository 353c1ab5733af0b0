"""A trimtab engine behind lm-evaluation-harness's model interface.

Texts become tokens, and too long ones are cut, exactly as with the harness's own `hf` backend, so that the
two agree wherever the plan computes the same function.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

import trimtab
from trimtab.decoding.randomness import child_seed
from trimtab.engine.engine import Engine
from trimtab.errors import ConfigError, RequestError
from trimtab.evaluation.harness.requests import fitted_pair, fitted_prompt, sampling_params, stop_texts
from trimtab.evaluation.harness.settings import PLAN_SETTINGS, HarnessSettings, merged
from trimtab.models.chat_template import ChatTemplate
from trimtab.models.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import postprocess_generated_text  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ConfigError(
        f"lm-evaluation-harness cannot be used ({error}); pip install 'trimtab[lm-eval]'"
    ) from None

_log = logging.getLogger(__name__)
# Requests handed to the engine at a time, in batches: enough to keep it full, few enough to queue cheaply.
_BATCHES_AT_ONCE = 8


@register_model("trimtab")
class TrimtabLM(TemplateLM):
    """One plan as a model of the harness.

    Args:
        pretrained: a folder or hub id, an `Engine` that is to be measured as it is, or None for the model
            that ships with trimtab.
        model_args: the settings of `HarnessSettings` and of `Plan`.

    Raises ConfigError for unknown or wrong settings, PlanError for a plan that cannot run the model.
    """

    def __init__(self, pretrained: str | Engine | None = None, **model_args: Any) -> None:
        super().__init__()
        if isinstance(pretrained, Engine):
            # The harness's own flags for device and batch size are the engine's already.
            settings = HarnessSettings.from_args(_without_plan(model_args))
            self.engine = pretrained
        else:
            settings = HarnessSettings.from_args({**model_args, **_named(pretrained)})
            plan = settings.plan
            model = trimtab.load(
                plan.model,
                dtype=None if plan.dtype == "auto" else plan.dtype,
                device="cpu" if plan.device == "auto" else plan.device,
                revision=settings.revision,
                adapter=plan.adapter,
            )
            self.engine = Engine(model, plan=plan)
        self.settings = settings
        self.text = _tokenizer(self.engine)
        context = self.engine.model.config.context_length
        if (settings.max_length or 0) > context and not self.engine.cache.endless:
            raise ConfigError(
                f"max_length is {settings.max_length} and the model's context is {context}; lower it, or "
                "choose a cache without an end, such as streaming"
            )
        self.max_length = settings.max_length or context
        self.max_gen_toks = settings.max_gen_toks
        self.batch_size = self.engine.plan.max_batch
        self.tokenizer = _facts(self.text, self.eot_token_id)
        self._template: str | None = None
        self._request_peak = 0

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> TrimtabLM:
        return cls(**merged(arg_dict, additional_config, torch.cuda.is_available()))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> TrimtabLM:
        from lm_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # --- texts and tokens

    @property
    def eot_token_id(self) -> int:
        named = self.text.token_to_id(self.text.special_tokens.get("eos_token", ""))
        return min(self.text.eos_ids) if named is None else named

    @property
    def prefix_token_id(self) -> int:
        chosen = self.settings.prefix_token_id
        if chosen is None:
            chosen = self.text.bos_id
        return self.eot_token_id if chosen is None else chosen

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.model.path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of `string`; a first token it already spells out is not added again."""
        frame = add_special_tokens
        if frame is None:
            first = self.text.decode([self.prefix_token_id], skip_special_tokens=False)
            spelled = bool(first) and string.startswith(first)
            frame = not spelled and self.settings.add_bos_token is not False
        ids = self.text.encode(string, add_special_tokens=frame)
        bos = self.text.bos_id
        if frame and self.settings.add_bos_token and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness records; a name chooses among several from now on."""
        if chat_template is False or chat_template is None:
            return None
        self._template = chat_template if isinstance(chat_template, str) else None
        return ChatTemplate(self.text.chat_templates, {}).source(self._template)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        def render(messages: Sequence[Mapping[str, str]]) -> str:
            return self.text.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                chat_template=self._template,
                **self.settings.chat_template_args,
            )

        try:
            return render(chat_history)
        except RequestError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if not others or len(others) == len(chat_history):
                raise
            _log.warning("the system message is left out: %s", error)
            return render(others)

    # --- what the harness asks

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would give it."""
        pairs = [fitted_pair(context, rest, self.max_length) for _, context, rest in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        # Longest first, so that no long text is left alone at the end; equal contexts side by side.
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], -len(pairs[i][1])))
        with self._progress(len(pairs), "Running loglikelihood requests", disable_tqdm) as bar:
            for part in self._parts(order):
                for wave in _waves(part, pairs):
                    for i, score in zip(wave, self.engine.score([pairs[i] for i in wave]), strict=True):
                        answers[i] = (sum(score.logprobs), all(score.greedy))
                        self._note(score.metrics.kv_bytes_peak)
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                    bar.update(len(wave))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context that overlap nowhere."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until one of its stop texts, an end token or its bound.

        Where a task samples, request `i` draws with a seed of its own, made of the harness's torch seed
        (`--seed`) or the task's `seed`; so samples differ from one another and a run can be repeated.
        """
        prompts, params, stops = [], [], []
        for i, request in enumerate(requests):
            text, generation = request.args
            seed = generation.get("seed")
            chosen = {**generation, "seed": child_seed(torch.initial_seed() if seed is None else seed, i + 1)}
            one = sampling_params(chosen, self.max_gen_toks, seed=0)
            ids = self.tok_encode(text) or [self.prefix_token_id]
            prompts.append(fitted_prompt(ids, self.max_length, one.max_tokens))
            params.append(one)
            stops.append(stop_texts(generation))
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        with self._progress(len(prompts), "Running generate_until requests", disable_tqdm) as bar:
            for part in self._parts(order):
                outs = self.engine.generate([prompts[i] for i in part], [params[i] for i in part])
                for i, out in zip(part, outs, strict=True):
                    texts[i] = self._answer(out.token_ids, stops[i])
                    self._note(out.metrics.kv_bytes_peak)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update(len(part))
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the scores: the plan, and the bytes it took."""
        engine, stats = self.engine, self.engine.stats()
        weights = next(engine.model.parameters())
        return {
            "model_num_parameters": engine.model.num_parameters(),
            "model_dtype": str(weights.dtype),
            "model_revision": self.settings.revision or "",
            "trimtab_version": trimtab.__version__,
            "trimtab_plan": str(engine.plan),
            "trimtab_label": engine.plan.label,
            "trimtab_backend": engine.backend,
            "trimtab_device": str(weights.device),
            "trimtab_kv_bytes_capacity": stats.kv_bytes_capacity,
            "trimtab_kv_bytes_peak": stats.kv_bytes_peak,
            "trimtab_kv_bytes_peak_of_one_request": self._request_peak,
            "trimtab_tokens_computed": stats.tokens,
            "trimtab_prefix_hit_tokens": stats.prefix_hit_tokens,
            "trimtab_preemptions": stats.preemptions,
        }

    # --- helpers

    def _answer(self, ids: list[int], stops: list[str]) -> str:
        """The text of generated tokens, without special tokens, thoughts, and what follows a stop text."""
        end = self.settings.think_end_token
        if isinstance(end, int):
            thoughts = len(ids) - ids[::-1].index(end) if end in ids else 0
            text = self.text.decode(ids[thoughts:]).lstrip()
        else:
            text = self.text.decode(ids)
        return postprocess_generated_text(text, stops, end if isinstance(end, str) else None)

    def _parts(self, order: list[int]) -> Iterator[list[int]]:
        size = self.engine.plan.max_batch * _BATCHES_AT_ONCE
        return (order[i : i + size] for i in range(0, len(order), size))

    def _note(self, held: int) -> None:
        self._request_peak = max(self._request_peak, held)

    @staticmethod
    def _progress(total: int, what: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=what, disable=disable)


def _waves(part: Iterable[int], pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """First one request of each context, then the others, which find the context computed."""
    seen: set[tuple[int, ...]] = set()
    first: list[int] = []
    rest: list[int] = []
    for i in part:
        context = tuple(pairs[i][0])
        (rest if context in seen else first).append(i)
        seen.add(context)
    return [wave for wave in (first, rest) if wave]


def _named(pretrained: str | None) -> dict[str, Any]:
    return {} if pretrained is None else {"pretrained": pretrained}


def _without_plan(model_args: Mapping[str, Any]) -> dict[str, Any]:
    flags = ("device", "batch_size", "max_batch_size")
    rest = {key: value for key, value in model_args.items() if key not in flags}
    wrong = sorted(rest.keys() & (PLAN_SETTINGS | {"plan", "revision"}))
    if wrong:
        raise ConfigError(f"an engine is given and {wrong[0]!r} besides; its plan is settled, leave that out")
    return rest


def _tokenizer(engine: Engine) -> Tokenizer:
    tokenizer = engine.model.tokenizer
    if tokenizer is None or not tokenizer.available:
        raise ConfigError(
            "the harness hands over texts, and this model has no tokenizer; put its tokenizer.json "
            "into the model's folder"
        )
    if not tokenizer.eos_ids:
        raise ConfigError(
            "the model names no end token, which the harness needs; set eos_token_id in config.json"
        )
    return tokenizer


def _facts(tokenizer: Tokenizer, eos_id: int) -> SimpleNamespace:
    """What the harness notes about a tokenizer."""
    named = tokenizer.special_tokens
    return SimpleNamespace(
        pad_token=named.get("pad_token"),
        pad_token_id=tokenizer.pad_id,
        eos_token=named.get("eos_token"),
        eos_token_id=eos_id,
        bos_token=named.get("bos_token"),
        bos_token_id=tokenizer.bos_id,
    )
