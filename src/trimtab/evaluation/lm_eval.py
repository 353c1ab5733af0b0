"""trimtab as a model of lm-evaluation-harness.

Importing this module makes `model="trimtab"` known to `lm_eval.simple_evaluate`. As a command,
`python -m trimtab.evaluation.lm_eval --model trimtab ...`, it is the harness's own with all its flags.
"""

from __future__ import annotations

import sys

from trimtab.errors import TrimtabError

try:
    from trimtab.evaluation.harness.model import TrimtabLM
except TrimtabError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["TrimtabLM"]


def main() -> None:
    """The harness's command line; a user's mistake is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
