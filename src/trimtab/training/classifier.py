"""A label head on a language model: texts to classes (LS-LLaMA, Li et al. 2023, arXiv 2310.01208).

The last layer's states of a text are pooled into one vector, and a linear head gives each class a logit. The
head is float32 whatever the model is. Without the causal mask every token sees its whole text; such a model
reads and no longer writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from trimtab.attachment import Base
from trimtab.errors import ConfigError, RequestError
from trimtab.models.packed import PackedAttend
from trimtab.models.transformer import Model
from trimtab.training.data.encoding import Marked, encode
from trimtab.training.data.segments import Segment
from trimtab.training.data.sources.build import first_token
from trimtab.training.keeping.folder import write_whole

TENSORS, FACTS = "classifier.safetensors", "classifier.json"
FORMAT = 1
Pooling = Literal["last", "max", "mean"]
_POOLINGS = get_args(Pooling)


class Classifier(nn.Module):
    """The head and how it is used.

    Attributes:
        labels: names of the classes, in the order of the logits.
        pooling: the state of the `last` token of a text, or the `mean` or `max` over its tokens.
        causal: whether tokens see only what comes before them.
    """

    def __init__(
        self, hidden_size: int, labels: Sequence[str], pooling: Pooling, causal: bool, seed: int = 0
    ) -> None:
        super().__init__()
        self.labels, self.causal = tuple(labels), causal
        self.pooling: Pooling = pooling
        self.score = nn.Linear(hidden_size, len(self.labels), bias=False)
        with torch.no_grad():
            self.score.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))

    def forward(self, model: Model, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Logits float32 `[S, C]` of S packed texts: `tokens[N]`, N the sum of `lengths`, none of them 0."""
        attend = PackedAttend(model.config, model.rotary, lengths, tokens.device, causal=self.causal)
        hidden = model.run(tokens, attend.positions, attend)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.score(pool(hidden, lengths, self.pooling).to(self.score.weight.dtype))

    def save(self, folder: str | Path, model: Model) -> None:
        """Write the head beside `model` in its `folder`; OutputError where that fails."""
        folder = Path(folder)
        facts = {
            "format": FORMAT,
            "labels": list(self.labels),
            "pooling": self.pooling,
            "causal": self.causal,
            "model": Base.of(model).fingerprint,
        }
        weight = self.score.weight.detach().cpu().contiguous()
        write_whole(folder / TENSORS, save({"score.weight": weight}))
        write_whole(folder / FACTS, json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, model: Model) -> Classifier:
        """The head in `folder`, made for `model`; ConfigError for anything missing, broken or of another."""
        folder = Path(folder).expanduser()
        facts = _read_facts(folder / FACTS)
        if facts["model"] != Base.of(model).fingerprint:
            raise ConfigError(
                f"the classifier in {folder} was trained with another model (fingerprint "
                f"{facts['model'][:12]}) than this one ({model.fingerprint()[:12]}); load the model beside it"
            )
        found = cls(model.config.hidden_size, facts["labels"], facts["pooling"], facts["causal"])
        try:
            weight = load_file(folder / TENSORS).get("score.weight")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{folder / TENSORS} is missing or damaged ({error}); train it again") from None
        if weight is None or weight.shape != found.score.weight.shape or not bool(weight.isfinite().all()):
            raise ConfigError(f"{folder / TENSORS} does not hold a head for {FACTS}; train it again")
        with torch.no_grad():
            found.score.weight.copy_(weight)
        return found.to(model.device).eval()


def pool(hidden: torch.Tensor, lengths: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """`hidden[N, D]` of S texts laid end to end to `[S, D]`."""
    texts = hidden.split(list(lengths))
    if pooling == "last":
        return torch.stack([text[-1] for text in texts])
    if pooling == "mean":
        return torch.stack([text.float().mean(0) for text in texts])
    return torch.stack([text.amax(0) for text in texts])


@dataclass(frozen=True, slots=True)
class Classified:
    """A text's likeliest class, and the probabilities of all classes in the classifier's order."""

    label: str
    probabilities: tuple[float, ...]


@torch.no_grad()
def classify(
    model: Model,
    classifier: Classifier,
    texts: Sequence[str],
    first: Literal["auto", "bos", "none"] = "auto",
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> list[Classified]:
    """The class of each text.

    Args:
        first: the token before each text, as the recipe's source had it.
        max_tokens: longer texts lose their ends; default: the model's context.
        batch_tokens: tokens computed together, at most; a longer text is computed alone.

    Raises RequestError for an empty text, ConfigError for a model without a tokenizer.
    """
    from trimtab.training.data.batch import pack, split

    segments = _encode(model, texts, first, max_tokens or model.config.context_length)
    rows: list[torch.Tensor] = []
    for group in split(segments, batch_tokens):
        batch = pack(group).to(model.device)
        rows.append(classifier(model, batch.tokens, batch.lengths).softmax(-1).cpu())
    chances = torch.cat(rows).tolist() if rows else []
    return [Classified(classifier.labels[row.index(max(row))], tuple(row)) for row in chances]


def _encode(
    model: Model, texts: Sequence[str], first: Literal["auto", "bos", "none"], max_tokens: int
) -> list[Segment]:
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.available:
        raise ConfigError("this model has no tokenizer, which texts need")
    before = first_token(tokenizer, first)
    segments = encode(tokenizer, [Marked(text, first=before) for text in texts])
    for number, segment in enumerate(segments):
        if not len(segment):
            raise RequestError(f"text {number} to classify is empty")
    return [Segment(s.tokens[:max_tokens], s.trained[:max_tokens]) for s in segments]


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing, so {file.parent} holds no classifier") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); train the classifier again") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ConfigError(f"{file} is no classifier of format {FORMAT}; train it again")
    kinds = {"labels": list, "pooling": str, "causal": bool, "model": str}
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind) or (name == "pooling" and facts[name] not in _POOLINGS):
            raise ConfigError(f"{file} has no proper entry {name!r}; train the classifier again")
    return facts
