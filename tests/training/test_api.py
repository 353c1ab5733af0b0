"""What `trimtab.train` refuses before it reads data or takes a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import trimtab
from trimtab.errors import ConfigError

LABELLED = {"kind": "labelled", "paths": ["nothing.jsonl"]}
TEXT = {"kind": "documents", "paths": ["nothing.txt"]}
CLASSIFY = {"name": "classify", "labels": ["good", "bad"]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mixture": [LABELLED]}, "'labelled' has classes.*objective: {name: classify"),
        ({"mixture": [TEXT], "objective": CLASSIFY}, "'classify' needs texts with labels.*'documents'"),
        ({"mixture": [LABELLED | {"labels": ["a"]}], "objective": CLASSIFY}, r"\['a'\].*\['good', 'bad'\]"),
        ({"model": {"source": "draft", "tokenizer": "elsewhere"}}, "'elsewhere'.*'model.new_tokenizer'"),
        ({"mixture": [{"kind": "skills", "texts": ["a"], "skills": ["json"]}]}, "'skills'.*a mapping"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_name(tmp_path, monkeypatch, changes, named):
    monkeypatch.chdir(tmp_path)
    recipe = {"output": "out", "model": {"source": "draft"}, "mixture": [TEXT], "tokens": 100}
    with pytest.raises(ConfigError, match=named):
        trimtab.train(recipe | changes)
    assert not Path("out").exists()
