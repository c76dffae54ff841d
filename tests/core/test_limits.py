"""Limits: an annotation says what a field may hold, and one check refuses the rest."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

import pytest

from inlay.core import limits
from inlay.core.errors import UserError
from inlay.core.limits import Count, Dropout, Rank, Scale, Seed
from inlay.core.numbers import check_divides
from inlay.methods import method, names


class Kind(enum.StrEnum):
    """An enum of another library's."""

    RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Settings:
    """One field of every form that a limit takes."""

    r: Rank = 8
    least: Count = 0
    seed: Seed | None = None
    drop: Dropout = 0.0
    scale: Scale = 1.0
    flag: bool = False
    kind: Literal["random", "text"] = "random"
    form: bool | Literal["mini"] | None = True
    ranks: dict[str, Rank] = dataclasses.field(default_factory=dict)
    ids: list[Count] = dataclasses.field(default_factory=list)
    free: int | str = 0


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 65_536, "least": 0, "seed": 2**63 - 1, "drop": 0.99, "scale": -3},
        {"flag": True, "kind": Kind.RANDOM, "form": "mini"},
        {"form": None, "ranks": {"q": 4}, "ids": [0, 7], "free": "anything"},
    ],
)
def test_what_an_annotation_allows_passes(settings: dict[str, Any]):
    made = Settings(**settings)
    limits.check(made)
    assert type(made.kind) is str  # and an enum's member is set to its value


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "r=0 must be a whole number from 1 to 65536"),
        ({"r": True}, "r=True must be"),
        ({"r": 65_537}, "r=65537 must be"),
        ({"r": None}, "r=None must be"),
        ({"least": -1}, "least=-1 must be a whole number from 0"),
        ({"seed": 0.5}, r"seed=0\.5 must be"),
        ({"drop": 1.0}, r"drop=1\.0 must be at least 0 and below 1"),
        ({"scale": float("inf")}, "scale=inf is no scale"),
        ({"scale": "1"}, "scale='1' is no scale"),
        ({"flag": 1}, "flag=1 is not one of True, False"),
        ({"flag": None}, "flag=None is not one of"),
        ({"kind": "txt"}, "kind='txt' is not one of random, text"),
        ({"form": "bat"}, "form='bat' is not one of True, False, mini, None"),
        ({"ranks": {"q": 0}}, r"ranks\['q'\]=0 must be"),
        ({"ids": [1, -2]}, "ids=-2 must be"),
    ],
)
def test_what_an_annotation_excludes_is_refused(settings: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        limits.check(Settings(**settings))


@pytest.mark.parametrize("name", names())
def test_every_switch_of_every_method_refuses_what_is_neither_true_nor_false(name: str):
    config = method(name).config
    switches = [f.name for f in dataclasses.fields(config) if f.type == "bool"]
    for switch in switches:
        with pytest.raises(UserError, match=rf"{switch}='yes' is not"):
            config(**{switch: "yes"})


def test_what_divides_no_side_is_told_with_one_that_does():
    check_divides("r", 4, 8, 12)
    with pytest.raises(UserError, match="r=8 does not divide the 8 and 12 of a layer; try 4"):
        check_divides("r", 8, 8, 12)
    with pytest.raises(UserError, match="g=64 does not divide the 54 of a layer; try 54"):
        check_divides("g", 64, 54, step=2)
    with pytest.raises(UserError, match="g=50 does not divide the 81 of a layer; try 27"):
        check_divides("g", 50, 81, step=2)
