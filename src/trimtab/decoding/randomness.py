"""Random numbers as a pure function of (seed, position, purpose, index), in integer arithmetic only.

There is no state to keep or to disturb: a request draws the same numbers whatever else is in its batch,
after preemption and recomputation, and on every machine. Three rounds of the splitmix64 finalizer, one for
each part of the key, make neighbouring keys unrelated. The values are part of the contract with users
("same seed, same text") and are pinned by tests.
"""

from __future__ import annotations

import secrets
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

_MASK: Final = 0xFFFFFFFFFFFFFFFF
_STEP: Final = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's own increment
_MULTIPLY_1: Final = 0xBF58476D1CE4E5B9
_MULTIPLY_2: Final = 0x94D049BB133111EB
_TO_UNIT: Final = 2.0**-53


class Purpose(IntEnum):
    """What a number is for; different purposes at the same position are independent."""

    SAMPLE = 0  # drawing a token
    ACCEPT = 1  # accepting a drafted token
    RESIDUAL = 2  # drawing the replacement of a rejected one
    DRAFT = 3  # drawing inside a drafter
    GUMBEL = 4  # noise over a whole vocabulary
    CHILD = 5  # deriving seeds
    RETRY = 6  # where a rejected text is taken up again


def uniform(seed: int, position: int, purpose: int = Purpose.SAMPLE, index: int = 0) -> float:
    """A number in [0, 1), a multiple of 2^-53.

    `seed` is any whole number (its low 64 bits count); `position` is the absolute position of the token
    in its sequence; `index` tells apart several numbers for one purpose at one position.
    """
    return (_bits(seed, position, purpose, index) >> 11) * _TO_UNIT


def uniforms(seed: int, position: int, purpose: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1): element i equals `uniform(seed, position, purpose, i)`."""
    base = _base(seed, position, purpose)
    # uint64 arithmetic on arrays wraps around silently, as it must here.
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(base)
    keys ^= keys >> np.uint64(30)
    keys *= np.uint64(_MULTIPLY_1)
    keys ^= keys >> np.uint64(27)
    keys *= np.uint64(_MULTIPLY_2)
    keys ^= keys >> np.uint64(31)
    return (keys >> np.uint64(11)).astype(np.float64) * _TO_UNIT


def child_seed(seed: int, index: int) -> int:
    """The seed of a request's sample number `index`; sample 0 keeps the request's own seed.

    So `n=1` gives the first of the texts that `n=4` gives.
    """
    return seed & _MASK if index == 0 else _bits(seed, 0, Purpose.CHILD, index)


def fresh_seed() -> int:
    """A seed nobody can guess, for requests that name none."""
    return secrets.randbits(64)


def _base(seed: int, position: int, purpose: int) -> int:
    return _mix(_mix(seed + _STEP) + position * _STEP + (purpose << 56))


def _bits(seed: int, position: int, purpose: int, index: int) -> int:
    return _mix(_base(seed, position, purpose) + (index + 1) * _STEP)


def _mix(x: int) -> int:
    """splitmix64's finalizer: a bijection of 64-bit words in which every bit moves every other."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MULTIPLY_1) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLY_2) & _MASK
    return x ^ (x >> 31)
