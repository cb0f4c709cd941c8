"""Fuzz inputs: bytes read as choices, seeds, and how a seed is changed without a coverage-guided fuzzer.

Called by every target (`Data`), by the short tests and by the runner (`TARGETS`, `seeds`).
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

FOLDER: Final = Path(__file__).parent
CORPUS: Final = FOLDER / "corpus"  # a folder for each target; only files named seed-* are in Git
TARGETS: Final = tuple(sorted(path.stem.removeprefix("target_") for path in FOLDER.glob("target_*.py")))
T = TypeVar("T")


class Data:
    """A fuzz input as a sequence of choices; zeros when it has run out, so every input means something."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece.ljust(count, b"\0")

    def integer(self, size: int) -> int:
        """An integer of `size` bytes, unsigned."""
        return int.from_bytes(self.take(size), "little")

    def below(self, limit: int) -> int:
        """An integer in 0 … limit - 1; limit is at most 65536."""
        return self.integer(1 if limit <= 256 else 2) % limit

    def pick(self, choices: Sequence[T]) -> T:
        """One of them."""
        return choices[self.below(len(choices))]

    def some(self) -> bytes:
        """Up to 255 bytes, by a length in front."""
        return self.take(min(self.integer(1), max(0, len(self._data) - self._at)))

    def text(self) -> str:
        """The same as text; what is not UTF-8 becomes U+FFFD."""
        return self.some().decode(errors="replace")


def seeds(target: str) -> list[bytes]:
    """The inputs of a target that are in Git, in a fixed order."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("seed-*"))]


def mutated(rng: random.Random, known: Sequence[bytes]) -> bytes:
    """A seed with up to six changes: bytes set, cut out, doubled, or taken from another seed."""
    data = bytearray(rng.choice(known))
    for _ in range(rng.randint(1, 6)):
        at, size = rng.randint(0, len(data)), rng.choice([1, 1, 2, 4, 16])
        match rng.randrange(6):
            case 0:
                data[at : at + size] = rng.randbytes(size)
            case 1:
                data[at : at + size] = rng.choice(_TELLING)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                other = rng.choice(known)
                start = rng.randint(0, len(other))
                data[at : at + size] = other[start : start + size]
            case _ if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


_TELLING: Final = (
    b"\0", b"\xff", b"\xff\xff", b"\x80", b"-1", b"0", b"1e999", b"99999999999999999999", b"true", b"null", b"[",
    b"{", b"]", b"}", b'"', b"\\ud800", b",", b":", b"=", b"/", b"@", b"*", b"%", b"\n", b"#", b"'",
    b"\xed\xa0\x80", b"[[rule]]\n", b"\xc2\xa0", b"\xd9\xa3",
)  # fmt: skip
