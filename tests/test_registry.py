"""The registry: names without imports, typed options, errors that name the fix."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from trimtab.errors import ConfigError
from trimtab.registry import KV_CACHES, SEAMS, Card, Registry, build_dataclass

CARD = Card(title="T", idea="i", exactness="e", cost="c", needs="n", avoid_when="a")


@dataclass(frozen=True, slots=True)
class Options:
    bits: Literal[2, 4] = 2
    ratio: float = 0.5
    rows: int = 8
    sinks: bool = True
    limit: int | None = None
    note: str = ""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A seam's folder with one method file, one base and one sub-package."""
    folder = tmp_path / "seamful"
    (folder / "shared").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "shared" / "__init__.py").write_text("")
    (folder / "base.py").write_text("raise RuntimeError('base must not count as a method')")
    (folder / "quick.py").write_text(
        "import seamful\n@seamful.REGISTRY.add(card=seamful.CARD)\nclass Quick: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import seamful

    seamful.REGISTRY, seamful.CARD = Registry("speed", "seamful", "how fast?"), CARD
    yield seamful
    for name in [name for name in sys.modules if name.split(".")[0] == "seamful"]:
        del sys.modules[name]


def test_a_file_is_a_method_and_is_imported_only_when_asked_for(package):
    assert package.REGISTRY.names() == ["quick"]
    assert "seamful.quick" not in sys.modules
    method = package.REGISTRY.get("quick")
    assert (method.name, method.seam, method.cls.__name__) == ("quick", "speed", "Quick")
    assert "seamful.quick" in sys.modules


def test_an_unknown_method_gets_the_nearest_names(package):
    with pytest.raises(ConfigError, match=r"unknown speed method 'quik'.*Did you mean 'quick'"):
        package.REGISTRY.get("quik")


def test_two_classes_cannot_have_one_name(package):
    package.REGISTRY.get("quick")
    other = type("Other", (), {"__module__": "elsewhere.quick"})
    with pytest.raises(ConfigError, match=r"two speed methods are called 'quick'"):
        package.REGISTRY.add(card=CARD)(other)


def test_a_method_without_options_refuses_any(package):
    with pytest.raises(ConfigError, match=r"unknown option 'bits' of .* 'quick'\. It has no options"):
        package.REGISTRY.build_options("quick", {"bits": 2})


@pytest.mark.parametrize("seam", sorted(SEAMS))
def test_every_shipped_method_loads_and_explains_itself(seam):
    registry = SEAMS[seam]
    assert registry.names(), f"no method is behind the seam {seam}"
    for name in registry.names():
        card = registry.get(name).card
        for part in ("title", "idea", "exactness", "cost", "needs", "avoid_when"):
            assert getattr(card, part).strip(), f"{seam} method {name} has no {part!r} on its card"


def test_names_of_the_caches_come_without_torch():
    code = "import sys; from trimtab.registry import KV_CACHES as r; print(r.names(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "False" in out
    assert "'full'" in out and "'base'" not in out


def test_the_policies_of_the_first_release_are_there():
    assert {"full", "streaming", "kivi", "h2o", "snapkv"} <= set(KV_CACHES.names())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"bits": "4"}, Options(bits=4)),
        ({"bits": 4, "ratio": "0.25", "rows": "16"}, Options(bits=4, ratio=0.25, rows=16)),
        ({"rows": 16.0}, Options(rows=16)),
        ({"sinks": "off"}, Options(sinks=False)),
        ({"sinks": "YES"}, Options(sinks=True)),
        ({"limit": "none"}, Options(limit=None)),
        ({"limit": "3"}, Options(limit=3)),
        ({"note": 7}, Options(note="7")),
    ],
)
def test_text_becomes_typed_values(raw, expected):
    assert build_dataclass(Options, raw, where="here") == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"bit": 2}, r"unknown option 'bit' of here\. Did you mean 'bits'"),
        ({"bits": "3"}, r"option 'bits' of here is '3'; allowed: 2, 4"),
        ({"rows": "many"}, r"'many'; it must be a whole number"),
        ({"rows": 1.5}, r"1\.5; it must be a whole number"),
        ({"rows": True}, r"True; it must be a whole number"),
        ({"ratio": "half"}, r"'half'; it must be a number"),
        ({"sinks": "perhaps"}, r"'perhaps'; it must be true or false"),
        ({"limit": "x"}, r"option 'limit' of here is 'x'; it must be a whole number"),
    ],
)
def test_a_wrong_option_is_one_clear_sentence(raw, message):
    with pytest.raises(ConfigError, match=message):
        build_dataclass(Options, raw, where="here")


def test_a_missing_option_is_named():
    @dataclass(frozen=True)
    class Needy:
        path: str

    with pytest.raises(ConfigError, match="here needs the option 'path'"):
        build_dataclass(Needy, {}, where="here")
