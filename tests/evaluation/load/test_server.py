"""Servers as processes: started, measured, stopped; and those that cannot start."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from trimtab.cli.main import app
from trimtab.errors import TrimtabError
from trimtab.evaluation.load.server import ServerProcess, free_port, healthy, resident

pytestmark = pytest.mark.slow


def test_a_server_of_ours_is_measured_and_stopped(tmp_path):
    words = "bench serve --rates 4 --duration 2s --warmup 500ms --slo ttft=60s --lengths output=8 --threads 1"
    words += " --cache kivi:bits=4 --json --serve '--max-queue 77' --out"
    result = CliRunner().invoke(app, [*shlex.split(words), str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert row["done"] == row["sent"] == row["good"] > 0
    assert row["settings"]["plan"] == "cache=kivi:bits=4 threads=1"
    assert row["counted"]
    assert row["output_tokens"] >= 1
    assert (tmp_path / "load.html").is_file()


def test_a_server_that_cannot_start_tells_why():
    with (
        pytest.raises(TrimtabError, match=r"the server ended before it was ready: .*kivy"),
        ServerProcess(["--plan", "kivy"]),
    ):
        pass


def test_a_killed_server_is_gone():
    with ServerProcess(["--plan", "full threads=1"]) as server:
        assert healthy(server.port)
        assert (server.memory() or 0) > 50_000_000
        server.kill()
        assert not healthy(server.port)
    assert resident(server.pid) is None
    assert not healthy(free_port())
