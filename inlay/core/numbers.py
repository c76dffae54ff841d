"""What the numbers in a configuration may be; each check raises UserError with the way out."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from inlay.core.errors import UserError

MOST_RANK = 65_536
"""Largest rank: beyond the width of any layer, a higher one only costs memory."""


def check_whole(name: str, value: Any, *, least: int = 1, most: int = MOST_RANK) -> None:
    """Raise UserError unless `value` is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{name}={value!r} must be a whole number from {least} to {most}")


def check_finite(name: str, value: Any) -> None:
    """Raise UserError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value!r} is no scale: give a finite number")


def check_dropout(name: str, value: Any) -> None:
    """Raise UserError unless `value` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{name}={value!r} must be at least 0 and below 1")


def check_one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise UserError unless `value` is one of `choices`; True and 1 are not the same."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise UserError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}")


def check_divides(name: str, value: int, *sides: int, step: int = 1) -> None:
    """Raise UserError unless `value` divides each of a layer's `sides`; it names one that does.

    step: what the named one is a multiple of, where there is such a one.
    """
    common = math.gcd(*sides)
    if common % value == 0:
        return
    divisors = [n for n in range(1, min(value, common) + 1) if common % n == 0]
    near = max([n for n in divisors if n % step == 0] or divisors)
    of = " and ".join(map(str, dict.fromkeys(sides)))
    raise UserError(f"{name}={value} does not divide the {of} of a layer; try {near}")
