"""Where a number came from: versions, machine, command, commit, date."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimtab import hardware


def provenance(seed: int) -> dict[str, Any]:
    """Plain values that every record carries."""
    import trimtab

    described = hardware.describe()
    versions = {k: described[k] for k in ("python", "torch", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"trimtab": trimtab.__version__, **versions},
        "hardware": {k: v for k, v in described.items() if k not in versions},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "seed": seed,
    }


def commit() -> str | None:
    """The git commit trimtab runs from, with `+` after it when files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        # An installed package may lie inside some other project's checkout: ask for this very file.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
