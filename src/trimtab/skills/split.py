"""Which parameters are for training and which are held out.

An exercise belongs to a split by what is particular about it: the two numbers of a sum, a name with its
secret number, the fields of a record, the sentence to be copied. The same parameters are held out in every
wording and in every skill that uses them, so a held-out exercise was never trained on in another dress.
"""

from __future__ import annotations

import json
import zlib
from typing import Literal

Split = Literal["train", "held-out"]
HELD_OUT_ONE_IN = 10


def held_out(kind: str, *parameters: str | int) -> bool:
    """Whether `parameters` of this kind are held out: about one in ten, the same on every machine."""
    key = json.dumps([kind, *parameters]).encode()
    return zlib.crc32(key) % HELD_OUT_ONE_IN == 0


def pair_held_out(a: int, b: int) -> bool:
    """Whether sums, differences and word problems of these two numbers are held out, in either order."""
    return held_out("numbers", min(a, b), max(a, b))
