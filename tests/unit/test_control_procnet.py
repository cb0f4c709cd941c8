"""/proc/net's lists of memberships, as kernels write them."""

import sys
from pathlib import Path

import pytest

from mrelay.control.procnet import ProcNet

IGMP = """Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter
1\tlo        :     1      V3
\t\t\t\t{local}     1 0:00000000\t\t0
12\tvery-long-name:     2      V2
\t\t\t\t{group}     1 0:00000000\t\t0
\t\t\t\t{ssm}     1 0:00000000\t\t0
"""
IGMP6 = """1    lo              ff020000000000000000000000000001     1 0000000C 0
12   very-long-name  ff3e0000000000000000000000000001     1 00000004 0
"""
MCFILTER = """Idx Device        MCA        SRC    INC    EXC
 12 very-l 0xe8010101 0x0a010109      1      0
 12 very-l 0xe8010101 0x0a010108      0      1
"""


def word(address: str) -> str:
    """As /proc/net/igmp has it."""
    packed = bytes(map(int, address.split(".")))
    return f"{int.from_bytes(packed, sys.byteorder):08X}"


@pytest.fixture
def lists(tmp_path: Path) -> ProcNet:
    text = IGMP.format(local=word("224.0.0.1"), group=word("239.1.1.1"), ssm=word("232.1.1.1"))
    for name, content in (("igmp", text), ("igmp6", IGMP6), ("mcfilter", MCFILTER)):
        (tmp_path / name).write_text(content)
    return ProcNet(tmp_path)


@pytest.mark.parametrize(
    ("ifindex", "group", "source", "member"),
    [
        (12, "239.1.1.1", None, True),
        (1, "239.1.1.1", None, False),
        (12, "239.1.1.2", None, False),
        (12, "ff3e::1", None, True),
        (12, "ff3e::2", None, False),
        (12, "232.1.1.1", "10.1.1.9", True),
        (12, "232.1.1.1", "10.1.1.8", None),  # the kernel does not list all that there are
        (12, "232.1.1.2", "10.1.1.9", False),
        (12, "ff3e::1", "fd00::1", None),
    ],
)
def test_members(lists: ProcNet, ifindex: int, group: str, source: str | None, member: bool | None) -> None:
    assert lists.member(ifindex, group, source) is member
    assert lists.member(ifindex, group, source) is member, "each read begins anew"


def test_without_lists_nobody_can_say(tmp_path: Path) -> None:
    assert ProcNet(tmp_path).member(1, "239.1.1.1", None) is None
