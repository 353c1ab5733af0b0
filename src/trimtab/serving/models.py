"""The served models by name: each is an engine under a plan. `/v1/models` lists them."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

from trimtab import __version__
from trimtab.errors import did_you_mean
from trimtab.serving.errors import ApiError
from trimtab.serving.token_texts import TokenTexts

if TYPE_CHECKING:
    from trimtab.engine.engine import Engine
    from trimtab.models.tokenizer import Tokenizer
    from trimtab.serving.worker import Worker


class ServedModel:
    """What requests for one name are served with.

    Attributes:
        name: what requests call it.
        tool_format: how it writes tool calls; `auto`: as its chat template shows.
        engine_name: the worker's name of the engine, several served models may share one (adapters).
        fingerprint: changes whenever the same seed may give another text: with trimtab's version, the
            model's weights, or the plan.
    """

    def __init__(self, name: str, engine_name: str, engine: Engine, tool_format: str = "auto") -> None:
        self.name = name
        self.engine_name = engine_name
        self.engine = engine
        self.tool_format = tool_format
        self.created = int(time.time())
        self.plan = str(engine.plan)
        described = f"{engine.model.fingerprint()} {self.plan} {engine.backend}"
        self.fingerprint = f"trimtab-{__version__}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
        self.texts = TokenTexts(self.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, where the model can read and write text."""
        tokenizer = self.engine.model.tokenizer
        return tokenizer if tokenizer is not None and tokenizer.available else None

    @property
    def context(self) -> int:
        return self.engine.model.config.context_length

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_templates)

    def card(self) -> dict[str, Any]:
        """Its entry in `/v1/models`."""
        engine, plan = self.engine, self.engine.plan
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "trimtab",
            "root": plan.model,
            "max_model_len": self.context,
            "trimtab": {
                "plan": self.plan,
                "label": plan.label,
                "cache": str(plan.cache),
                "chat": self.chats,
                "dtype": str(engine.model.dtype).removeprefix("torch."),
                "device": str(engine.model.device),
                "kv_bytes_capacity": engine.cache.bytes_capacity,
            },
        }


class Models:
    """All served models; one for each of the worker's engines."""

    def __init__(self, worker: Worker, tool_format: str = "auto") -> None:
        self._served = {
            name: ServedModel(name, name, worker.engine(name), tool_format) for name in worker.names
        }

    def get(self, name: str) -> ServedModel:
        """The model of that name. Raises ApiError 404."""
        try:
            return self._served[name]
        except KeyError:
            hint = did_you_mean(name[:200], self._served)
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here.{hint}",
                param="model",
                code="model_not_found",
            ) from None

    def cards(self) -> dict[str, Any]:
        """The answer of `/v1/models`."""
        return {"object": "list", "data": [served.card() for served in self._served.values()]}
