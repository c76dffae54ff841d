"""The words that the generated chats of inlay-tiny are made of: fixed lists and made-up words.

Everything here was written for this project (Apache-2.0). The lists are small on purpose: what the
base should learn is to copy and to follow a form, so most slots are filled with made-up words,
numbers and words of the standard library's documentation instead, which no list can teach by heart.
"""

# ruff: noqa: SIM905  a line of words reads better than a column of quoted ones

from __future__ import annotations

import random

KINDS: dict[str, list[str]] = {
    "animal": "cat dog fox horse cow sheep goat bear wolf mouse owl duck hen frog fish".split(),
    "color": "red blue green yellow black white brown gray pink purple orange silver gold".split(),
    "food": "bread rice soup apple pear cheese honey butter cake salad bean onion egg".split(),
    "drink": "tea coffee milk water juice cider cocoa lemonade".split(),
    "tool": "hammer saw drill brush knife shovel pliers file wrench ladder".split(),
    "place": "London Paris Rome Oslo Lima Cairo Delhi Berlin Madrid Quito Tokyo Boston".split(),
    "furniture": "table chair lamp shelf desk bed sofa mirror stool cabinet".split(),
    "clothing": "coat hat scarf shirt glove boot belt sock jacket dress".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}
NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivan June Kim Leo Mia Nils Olga Paul Quin Rosa Sam Tara "
    "Uma Vera Will Xena Yara Zoe Anna Bob Carla David Emil Frida Greta Hugo Iris Jonas Karl Lena"
).split()
MATERIALS = (
    "wooden steel glass small large round square old new plain folding heavy light soft".split()
)
THINGS = (
    "box bag book bottle clock phone kettle radio camera blanket basket pen cup bowl plate vase "
    "ticket key card bike tent candle fan heater mat pillow towel watch wallet umbrella"
).split()
TOPICS = "delivery payment weather travel music garden repair school office kitchen sport".split()
EVERYDAY = (
    "hello please thanks thank you my your the a it is was were has have had not never yet still "
    "again today yesterday week month late early broken wrong missing lost paid charged twice sent "
    "came arrived ordered bought want need would like can could change cancel return refund order "
    "number address account invoice package mail money price size part does work stopped turn on "
    "off open closed I we they he she but and or so because since when where what who how much "
    "many good bad kind regards help me us with for from to in at of by about question problem"
).split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl pr sh sk st th tr".split()
_VOWELS = "a e i o u ai ea ee oo ou".split()
_CODAS = ["", "", "", "b", "ck", "d", "g", "l", "m", "n", "nd", "p", "r", "s", "st", "t", "x"]


def invented(rng: random.Random) -> str:
    """Return a pronounceable word of one to three syllables that means nothing."""
    syllables = rng.choice((1, 1, 2, 2, 2, 3))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )


def number(rng: random.Random, digits: tuple[int, ...] = (1, 2, 2, 3, 4, 4, 5, 6)) -> str:
    """Return a decimal number without a leading zero."""
    n = rng.choice(digits)
    return str(rng.randrange(10 ** (n - 1), 10**n))


def thing(rng: random.Random) -> str:
    """Return the name of something one can buy, of one to three words."""
    noun = rng.choice(THINGS + KINDS["furniture"] + KINDS["clothing"] + KINDS["tool"])
    front = [rng.choice(KINDS["color"])] if rng.random() < 0.6 else []
    front += [rng.choice(MATERIALS)] if rng.random() < 0.3 else []
    front = front or ([invented(rng)] if rng.random() < 0.3 else [])
    return " ".join([*front, noun])


class Words:
    """A source of single words: made-up, numeric, everyday, or from the documentation."""

    def __init__(self, documented: list[str]):
        self.documented = documented

    def one(self, rng: random.Random) -> str:
        """Return one word without spaces."""
        draw = rng.random()
        if draw < 0.25:
            return invented(rng)
        if draw < 0.40:
            return number(rng)
        if draw < 0.50:
            return rng.choice(NAMES)
        if draw < 0.65:
            return rng.choice(rng.choice(list(KINDS.values())))
        if draw < 0.75:
            return rng.choice(THINGS + EVERYDAY)
        return rng.choice(self.documented)

    def some(self, rng: random.Random, low: int, high: int) -> list[str]:
        """Return `low` to `high` words, all different."""
        n = rng.randint(low, high)
        words: dict[str, None] = {}
        while len(words) < n:
            words[self.one(rng)] = None
        return list(words)
