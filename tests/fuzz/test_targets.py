"""The fuzz targets for a few seconds each: every seed, then changed seeds, the same ones in every run.

`make fuzz` gives them a million inputs. A seed that once failed stays, so it is a regression test.
"""

import importlib
import logging
import random
import time
from collections.abc import Iterator

import pytest

from fuzz.data import TARGETS, mutated, seeds

INPUTS = 400
SECONDS = 5.0  # a slow machine tries fewer, in the same order


@pytest.fixture
def quiet() -> Iterator[None]:
    """No warnings of the product: there would be thousands."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_fails_but_by_its_documented_error(target: str) -> None:
    module = importlib.import_module(f"fuzz.target_{target}")
    known = seeds(target)
    assert known, f"tests/fuzz/corpus/{target} has no seed-*"
    rng = random.Random(f"mrelay {target}")
    inputs = [*known, *(mutated(rng, known) for _ in range(INPUTS))]
    start = time.monotonic()
    for number, data in enumerate(inputs):
        try:
            module.check(data)
        except BaseException as error:
            error.add_note(f"target {target}, input {number}: {data!r}")
            raise
        if number >= len(known) and time.monotonic() - start > SECONDS:
            break
