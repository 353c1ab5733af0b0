"""How long prompts and answers are: a mix as of people who chat."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from trimtab.errors import ConfigError, did_you_mean

SHAREGPT_CONTEXT = 2048  # what the conversations were held in: a smaller context scales all lengths down


@dataclass(frozen=True, slots=True)
class LengthMix:
    """Log-normal lengths in tokens: medians, and the standard deviations of their logarithms.

    The defaults have the mean lengths that Kwon et al. 2023 (PagedAttention, figure 11) give for ShareGPT,
    161 tokens in and 338 out; that they are log-normal, and how wide, is our choice.
    """

    prompt: float = 69.0
    prompt_sigma: float = 1.3
    output: float = 225.0
    output_sigma: float = 0.9

    @classmethod
    def parse(cls, text: str) -> LengthMix:
        """From `"prompt=200,output=50"`; what is not named keeps its default."""
        values: dict[str, float] = {}
        known = [field.name for field in fields(cls)]
        for word in filter(None, text.split(",")):
            key, _, number = word.partition("=")
            if key not in known:
                raise ConfigError(f"--lengths has no setting {key!r}.{did_you_mean(key, known)}")
            try:
                values[key] = float(number)
            except ValueError:
                values[key] = -1.0
            least = 0.0 if key.endswith("sigma") else 1.0
            if not least <= values[key] < 1e6:
                raise ConfigError(f"--lengths has {word!r}; give {key} as a number of at least {least:g}")
        return cls(**values)

    def draw(self, rng: random.Random, context: int) -> tuple[int, int]:
        """Tokens of one prompt and of its answer; together they fit into `context`."""
        scale = min(1.0, context / SHAREGPT_CONTEXT)
        drawn_in = rng.lognormvariate(0.0, self.prompt_sigma) * self.prompt * scale
        drawn_out = rng.lognormvariate(0.0, self.output_sigma) * self.output * scale
        # As the usual filter of ShareGPT does: at most half the context for the prompt.
        prompt = max(1, min(round(drawn_in), context // 2))
        return prompt, max(1, min(round(drawn_out), context - prompt))
