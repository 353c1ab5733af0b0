"""Head scores as a page: a map of layers and heads, the best heads, and what leaving them out does."""

from __future__ import annotations

from html import escape

from torch import Tensor

from trimtab.evaluation.inspection.heads import RETRIEVAL, Ablation, HeadScores
from trimtab.evaluation.page import environment

CELL, NUMBERED, GAP = 22, 40, 6  # sizes of a cell without and with its number; room between KV heads
NUMBERS_UP_TO = 16  # query heads
LEFT, BELOW = 38, 42
DARK_FROM = 0.72  # from here on the cell is so strong that its text must be light
ROWS = 12  # of the table


def head_map(scores: Tensor, num_kv_heads: int) -> str:
    """Scores 0..1 [L, H] as cells, layers down and query heads across, the heads of a KV head together."""
    layers, heads = scores.shape
    group, numbered = heads // num_kv_heads, heads <= NUMBERS_UP_TO
    size = NUMBERED if numbered else CELL
    lefts = [LEFT + h * size + h // group * GAP for h in range(heads)]
    width, bottom = lefts[-1] + size + 2, layers * size
    parts = []
    for layer, row in enumerate(scores.tolist()):
        middle = (layer + 0.5) * size + 4
        parts.append(_text(LEFT - 8, middle, str(layer), "tick", "end"))
        for h, (left, score) in enumerate(zip(lefts, row, strict=True)):
            parts.append(
                f'<rect class="cell" x="{left + 1}" y="{layer * size + 1}" width="{size - 2}" '
                f'height="{size - 2}" rx="3" fill-opacity="{0.07 + 0.93 * score:.2f}">'
                f"<title>layer {layer}, head {h} (KV head {h // group}): {score:.2f}</title></rect>"
            )
            if numbered:
                cls = "cell-text strong" if score >= DARK_FROM else "cell-text"
                parts.append(_text(left + size / 2, middle, f"{100 * score:.0f}", cls, "middle"))
    step = 1 if numbered else 4
    parts += [
        _text(lefts[h] + size / 2, bottom + 15, str(h), "tick", "middle") for h in range(0, heads, step)
    ]
    parts.append(_text(LEFT - 8, bottom + 15, "head", "tick", "end"))
    if group > 1:
        parts.append(_text(LEFT - 8, bottom + 33, "KV", "tick", "end"))
        for g in range(num_kv_heads):
            middle = (lefts[g * group] + lefts[(g + 1) * group - 1] + size) / 2
            parts.append(_text(middle, bottom + 33, str(g), "tick", "middle"))
    return (
        f'<svg viewBox="0 0 {width} {bottom + BELOW}" style="max-width: {round(1.3 * width)}px" role="img" '
        f'aria-label="Retrieval score by layer and head" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, cls: str, anchor: str) -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def page(found: HeadScores, check: Ablation | None, num_kv_heads: int, model: str, facts: str) -> str:
    """The whole page as HTML, self-contained; `facts` is a line about what was asked."""
    scores = found.scores
    group = scores.shape[1] // num_kv_heads
    best = [(layer, h, h // group, float(scores[layer, h])) for layer, h in found.ranked()[:ROWS]]
    return (
        environment()
        .get_template("heads.html.j2")
        .render(
            model=model,
            facts=facts,
            found=found,
            retrieval=len(found.retrieval()),
            threshold=RETRIEVAL,
            heads=scores.numel(),
            best=[row for row in best if row[3] > 0],
            picture=head_map(scores, num_kv_heads),
            check=check,
        )
    )
