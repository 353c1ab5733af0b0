"""The small world that the exercises speak of: names, places and words.

The plain lists are those of the main form of every exercise. The `MORE_` lists and invented words are mixed
in for training, so that copying is learnt rather than the lists.
"""

from __future__ import annotations

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Ann Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Mary Nick Olive Paul Quinn Rose "
    "Sam Tom Una Victor Wendy Zoe"
)
LAST_NAMES = _words(
    "Bell Brook Cook Dean Field Ford Fox Gray Hart Hill King Lake Lee Marsh Moon North Rivers Stone West Wood"
)
CITIES = _words(
    "Athens Berlin Boston Cairo Delhi Dublin Lima London Madrid Oslo Paris Prague Rome Tokyo Vienna"
)
JOBS = _words("baker clerk cook doctor farmer gardener lawyer painter sailor smith tailor teacher")
WORDS = _words(
    "along and bank between bright children cold green its men old ran river sky slow steps the trees "
    "under walked was while with"
)
THINGS = _words("apples bottles ribbons")

MORE_FIRST_NAMES = _words(
    "Ada Albert Alice Amir Anna Arthur Bella Bruno Carl Cora Daniel Dora Edith Elena Eric Eva Felix Fiona "
    "George Hanna Hugo Ida Ivan James Jane John Julia Karl Laura Lena Lucy Mark Martha Max Mia Nina Noah "
    "Oscar Otto Peter Ralph Rita Ruth Sarah Simon Stella Theo Vera Walter Yusuf"
)
MORE_LAST_NAMES = _words(
    "Abbott Adams Archer Baker Barnes Bishop Carter Clark Cooper Cross Davis Drake Ellis Evans Fisher Foster "
    "Garcia Green Harris Hunt Jones Khan Knight Lang Mason Miller Moore Nelson Owen Page Parker Reed Rossi "
    "Shaw Silva Smith Swan Taylor Turner Walker Ward Weber White Wolf Young"
)
MORE_CITIES = _words(
    "Amsterdam Ankara Bern Bristol Brussels Chicago Denver Dresden Florence Geneva Glasgow Hamburg Helsinki "
    "Istanbul Kyoto Lisbon Lyon Milan Montreal Moscow Mumbai Munich Nairobi Naples Odessa Porto Quebec Riga "
    "Seattle Seoul Sydney Toronto Turin Venice Warsaw York Zurich"
)
MORE_JOBS = _words(
    "barber builder butcher carpenter chemist dancer dentist driver fisher "
    "guard hunter judge mason merchant miller miner nurse pilot plumber poet printer shepherd singer "
    "soldier surgeon vet waiter weaver writer"
)
MORE_THINGS = _words(
    "balls bells books boxes buttons cakes candles cards chairs coins cups dolls eggs flowers hats keys "
    "lamps lemons letters nuts oranges pears pencils plates plums roses shells spoons stamps stones toys"
)
MORE_WORDS = _words(
    "above after again air autumn back ball basket bell bird black blue boat book bread bridge brother "
    "carry castle chair city clear cloud come corner dance dark day deep door dream dry early earth east "
    "empty evening every eye fair far field find fire first fish floor flower forest fresh garden gate "
    "gentle glass gold good grass grey hand happy head heart heavy high hill home horse house island kind "
    "king lake lamp last leaf letter light little long loud low made many map meadow milk moon morning "
    "mother mountain music narrow near never new night noise north now ocean often open orange paper path "
    "people place plain pretty quick quiet rain read red ring road rock roof room rose round sail salt sand "
    "sea shadow ship silver sing small snow soft song south spring star stone storm street strong summer sun "
    "table tall time tower town village voice wall warm water wave west white wide wild wind window winter "
    "wood word world yellow young"
)

_STARTS = _words("b br ch d dr f gl h j k kl l m n r s st t tr v w z")
_VOWELS = _words("a e i o u ai ea o a e")
_ENDS = _words("n r l m nd rn") + ("", "", "")


def invented(rng: random.Random) -> str:
    """A made-up word of two or three syllables, e.g. `tralo`."""
    syllables = [rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 3))]
    return "".join(syllables) + rng.choice(_ENDS)


def full_names(rng: random.Random, count: int) -> list[str]:
    """`count` different full names of the main lists, e.g. `Rose Marsh`; at most 480."""
    return paired_names(rng, count, FIRST_NAMES, LAST_NAMES)


def paired_names(rng: random.Random, count: int, first: tuple[str, ...], last: tuple[str, ...]) -> list[str]:
    pairs = rng.sample(range(len(first) * len(last)), count)
    return [f"{first[p // len(last)]} {last[p % len(last)]}" for p in pairs]


def secret_number(rng: random.Random) -> str:
    """Five digits, e.g. `48213`."""
    return str(rng.randrange(10_000, 100_000))


def secret_sentence(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def secret_question(name: str) -> str:
    return f"What is the secret number of {name}?"
