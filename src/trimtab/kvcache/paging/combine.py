"""Which cache methods go together: one that chooses rows, one that stores them, one that places them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.registry import KV_CACHES

if TYPE_CHECKING:
    from trimtab.plan import MethodChoice

STAGES = ("alone", "keep", "store", "place")
_QUESTION = {
    "keep": "which rows stay",
    "store": "in which form rows are stored",
    "place": "where rows are kept",
}


def in_order(choices: list[MethodChoice]) -> list[MethodChoice]:
    """The same methods in the order in which they work."""
    return sorted(choices, key=lambda c: STAGES.index(KV_CACHES.get(c.name).cls.stage))


def problems(choices: list[MethodChoice]) -> list[str]:
    """Every reason why these methods cannot be combined."""
    if len(choices) < 2:
        return []
    found = []
    by_stage: dict[str, MethodChoice] = {}
    for choice in choices:
        cls = KV_CACHES.get(choice.name).cls
        if cls.stage == "alone":
            others = " and ".join(c.name for c in choices if c is not choice)
            found.append(f"{choice.name} cannot be combined with {others}: {cls.alone_because}")
        elif cls.stage in by_stage:
            first = by_stage[cls.stage].name
            found.append(f"{first} and {choice.name} both decide {_QUESTION[cls.stage]}; choose one of them")
        by_stage.setdefault(cls.stage, choice)
    if not found and "store" in by_stage:
        found += _with_store(by_stage["store"], by_stage.get("keep"), by_stage.get("place"))
    return found


def _with_store(store: MethodChoice, keep: MethodChoice | None, place: MethodChoice | None) -> list[str]:
    """Why rows packed by `store` cannot be chosen or placed so."""
    found, packer = [], KV_CACHES.get(store.name).cls
    early = packer.packs(store.options) == "as it comes"
    if keep and not packer.single_rows:
        if KV_CACHES.get(keep.name).cls.drops_settled(keep.options):
            found.append(f"{keep} drops single rows again later, but {packer.not_single_because}")
        if early:
            found.append(
                f"{store} packs the prompt as it comes, and {keep.name} chooses among its rows at the end, "
                "when single ones cannot be dropped; use prefill=whole"
            )
    if place and early:
        found.append(
            f"{store} packs the prompt as it comes, and {place.name} answers it from rows in full; "
            "use prefill=whole"
        )
    return found
