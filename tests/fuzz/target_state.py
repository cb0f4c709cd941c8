"""The state file: Corrupt or Newer, or a state that control can run on, which encodes to what it was."""

from mrelay.control.slots import Slots
from mrelay.control.state import Corrupt, Newer, decode, encode
from mrelay.counters_size import MAX_LINKS, MAX_RULES


def check(data: bytes) -> None:
    try:
        state = decode(data)
    except (Corrupt, Newer) as error:
        str(error).encode()  # it is logged
        return
    assert decode(encode(state)) == state
    _usable(state.slots)


def _usable(slots: Slots) -> None:
    for table, limit, start in (
        (slots.rules, MAX_RULES, slots.next_rule),
        (slots.links, MAX_LINKS, slots.next_link),
    ):
        indices = [slot.index for slot in table.values()]
        assert all(0 <= index < limit for index in indices)
        assert len(set(indices)) == len(indices), "each counts in a slot of its own"
        assert 0 <= start < limit
        assert all(value >= 0 for slot in table.values() for value in slot.base)
