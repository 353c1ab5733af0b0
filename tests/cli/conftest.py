from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from trimtab.cli.main import app


@pytest.fixture
def trimtab_cli():
    """Calls the command line in this process: `trimtab_cli("info", "--json")`."""

    def call(*words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(words), input=stdin, prog_name="trimtab", catch_exceptions=False)

    return call
