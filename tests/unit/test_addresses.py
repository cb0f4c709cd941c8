"""Addresses from text: as the standard library has them, whatever the text."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

from hypothesis import example, given
from hypothesis import strategies as st

from mrelay.addresses import address_of

NEAR = st.lists(st.from_regex(r"\A0?[0-9]{0,3}\Z"), min_size=1, max_size=6).map(".".join)


@example("239.1.1.1\0")
@example("239.1.1.01")
@example("239.1.1.1 ")
@example("239.1.1.٣")
@example("0x7f.0.0.1")
@example("2130706433")
@example("127.1")
@example("fe80::1%lo")
@given(st.ip_addresses().map(str) | NEAR | st.text())
def test_an_address_is_what_the_standard_library_says(text: str) -> None:
    assert outcome(address_of, text) == outcome(ip_address, text)


def outcome(read: Callable[[str], IPv4Address | IPv6Address], text: str) -> IPv4Address | IPv6Address | None:
    """None when it is no address."""
    try:
        return read(text)
    except ValueError:
        return None
