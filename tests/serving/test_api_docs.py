"""What docs/api.md shows works as it stands, and its tables name every field there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.server import Server
from trimtab.serving.protocol import ChatRequest, CompletionRequest

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_examples_run(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("python")).replace(ADDRESS, f"http://127.0.0.1:{server.port}")
    found: dict[str, object] = {}
    exec(code, found)
    assert found["word"].choices[0].message.content in ("yes", "no")  # type: ignore[attr-defined]
    assert "tokens/s" in capsys.readouterr().out
    found["client"].close()  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_example_of_running_a_server_runs(server: Server) -> None:
    page = PAGE.with_name("serving.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    found: dict[str, object] = {}
    exec(code.replace(ADDRESS, f"http://127.0.0.1:{server.port}"), found)
    assert found["answer"].choices[0].text  # type: ignore[attr-defined]
    found["client"].close()  # type: ignore[attr-defined]


def test_the_curl_examples_run(server: Server) -> None:
    (text,) = blocks("bash")
    script = text.replace(ADDRESS, f"http://127.0.0.1:{server.port}").replace("curl ", "curl -sS --fail ")
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert '"object":"list"' in done.stdout and '"text_completion"' in done.stdout
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_every_field_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for model in (CompletionRequest, ChatRequest):
        missing = [name for name in model.model_fields if f"`{name}`" not in page]
        assert not missing
