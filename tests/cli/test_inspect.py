import json

import trimtab
from trimtab.attachment import Attachment

FEW = [f"--option={setting}" for setting in ("lengths=200", "depths=2", "samples=1", "sequences=2")]


def test_heads_are_listed_checked_and_written(trimtab_cli, tmp_path):
    out = tmp_path / "heads"
    result = trimtab_cli("inspect", "heads", *FEW, "--ablate=2", "--draws=1", "--top=3", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["layer-head", "KV", "head", "score"]
    config = trimtab.load().config
    heads = config.num_layers * config.num_heads
    assert any(f"of {heads} heads retrieve; 2 of 2 needles found" in line for line in lines)
    record = json.loads((out / "heads.json").read_text())
    best = [line.split()[0] for line in lines[1:4]]
    assert best == sorted(record["means"], key=lambda name: -record["means"][name])[:3]
    assert len(record["heads"]) == heads and len(record["heads"][best[0]]) == 2
    assert record["means"][best[0]] == sum(record["heads"][best[0]]) / 2 > 0.5
    without = record["ablation"]["without"]
    assert without < record["ablation"]["whole"] == 1
    assert any(line.startswith(f"without the best 2: {without:.0%} found") for line in lines)
    made = Attachment.load(out / "retrieval_heads")
    assert made.kind == "retrieval_heads"
    assert made.tensors["scores"].shape == (config.num_layers, config.num_heads)
    assert made.measured["ablation"] == record["ablation"]
    html = (out / "heads.html").read_text()
    assert html.count("<rect") == heads and "<link" not in html and "src=" not in html

    again = trimtab_cli("inspect", "heads", *FEW, "--out", str(out))
    assert again.exit_code == 2 and "holds an inspection already" in again.stderr
    anew = trimtab_cli("inspect", "heads", *FEW, "--ablate", "0", "--json", "--overwrite", "--out", str(out))
    assert anew.exit_code == 0 and json.loads(anew.stdout)["ablation"] is None
    used = trimtab_cli(
        *("generate", "The ship", "--max-tokens", "2", "--temperature", "0"),
        *("--cache", f"retrieval_heads:keep=0.1,attachment={out / 'retrieval_heads'}"),
    )
    assert used.exit_code == 0 and used.stdout.strip()


def test_mistakes_are_one_line(trimtab_cli):
    for words, says in (
        (["--ablate", "1000"], "1000 heads cannot be left out"),
        (["--option", "lengths=20"], "each must be at least 64"),
        (["--option", "length=200"], "unknown option 'length'"),
        (["--data", "none.txt"], "'none.txt' does not exist"),
    ):
        result = trimtab_cli("inspect", "heads", *words)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
    assert "No such command 'head'" in trimtab_cli("inspect", "head").stderr
