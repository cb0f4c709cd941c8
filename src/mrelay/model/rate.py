"""A rule's rate: how many datagrams, and how many bits of payload, it passes in a second.

Owns the syntax `10kpps`, `50Mbit/s`, or both with a comma between. Called by rule.py. Nothing here blocks.
"""

import re
from dataclasses import dataclass
from typing import Final

from mrelay.model.issue import fault, show

_TERM: Final = re.compile(r"([0-9]{1,13}(?:[.][0-9]{1,6})?)\s*([kMG]?)(pps|bit/s)")
_FACTOR: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_MOST: Final = 10**12
_EXAMPLE: Final = 'write for example "10kpps", "50Mbit/s", or both: "10kpps,50Mbit/s"'


@dataclass(frozen=True, slots=True)
class Rate:
    """`packets` a second and `bits` of payload a second; 0 where that is not limited."""

    packets: int = 0
    bits: int = 0

    def __str__(self) -> str:
        terms = ((self.packets, "pps"), (self.bits, "bit/s"))
        return ",".join(f"{_short(number)}{unit}" for number, unit in terms if number)


def read_rate(value: object) -> Rate | None:
    """The rate that text says; None stays None. Raises a fault that says what is wrong with it."""
    if value is None or isinstance(value, Rate):
        return value
    if not isinstance(value, str):
        raise fault(f"{show(value)} is not a rate", _EXAMPLE)
    found: dict[str, int] = {}
    for text in value.split(","):
        term = _TERM.fullmatch(text.strip())
        if term is None or term[3] in found:
            raise fault(
                f"{show(text.strip())} is not a rate" if term is None else f"{value!r} names one unit twice",
                _EXAMPLE,
            )
        found[term[3]] = _number(term[1], term[2])
    return Rate(found.get("pps", 0), found.get("bit/s", 0))


def _number(digits: str, factor: str) -> int:
    whole, _, part = digits.partition(".")
    number = int(whole + part) * _FACTOR[factor] // int("1" + "0" * len(part))
    if not 1 <= number <= _MOST:
        raise fault(
            f"{digits}{factor} is not from 1 to 1000G",
            "leave rate out to pass everything; remove the rule to pass nothing",
        )
    return number


def _short(number: int) -> str:
    for letter in ("G", "M", "k"):
        if number % _FACTOR[letter] == 0:
            return f"{number // _FACTOR[letter]}{letter}"
    return str(number)
