"""bpf/mrelay.h and layout.py describe the same memory: the compiled programs' BTF against NumPy's dtypes."""

from typing import Any

import numpy as np
import pytest

from mrelay.ebpf import layout, load

pytestmark = pytest.mark.netns
STRUCTS: dict[str, Any] = {
    "flow4_key": layout.FLOW4_KEY, "flow6_key": layout.FLOW6_KEY, "flow": layout.FLOW, "output": layout.OUTPUT,
    "hop": layout.HOP, "count": layout.COUNT, "meter": layout.METER, "limit": layout.LIMIT,
    "place": layout.PLACE, "broadcast": layout.BROADCAST, "progress": layout.PROGRESS,
    "range_key": layout.RANGE_KEY, "trip": layout.TRIP,
}  # fmt: skip


@pytest.mark.parametrize("program", [load.RELAY, load.RING])
@pytest.mark.parametrize("struct", STRUCTS)
def test_struct_is_the_same_in_both(program: str, struct: str) -> None:
    """Every member: name, offset, size; and the whole."""
    dtype = np.dtype(STRUCTS[struct])
    assert dtype.fields is not None
    ours = {name: (field[1], field[0].itemsize) for name, field in dtype.fields.items()}
    with load.open_object(program) as opened:
        assert opened.layout(struct) == (dtype.itemsize, ours)
