"""Captures, read back by Scapy."""

import io

from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import RawPcapNgReader

from mrelay.protocols import pcapng

TIME = 1_700_000_000_123_456_789


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=99), st.text(max_size=9), st.booleans()), max_size=9))
def test_what_is_written_is_read(packets: list[tuple[bytes, str, bool]]) -> None:
    file = pcapng.section("mrelay test") + pcapng.interface("eth0", pcapng.LINKTYPE_ETHERNET, 65535)
    for number, (data, comment, outgoing) in enumerate(packets):
        file += pcapng.packet(0, TIME + number, data, len(data) + 5, comment=comment, outgoing=outgoing)
    file += pcapng.statistics(0, TIME, len(packets), 3)
    read = list(RawPcapNgReader(io.BytesIO(file)))
    assert len(read) == len(packets)
    for number, ((data, meta), (want, comment, outgoing)) in enumerate(zip(read, packets, strict=True)):
        assert data == want
        assert meta.wirelen == len(want) + 5
        assert (meta.tshigh << 32 | meta.tslow) == TIME + number
        assert meta.tsresol == 10**9 and meta.ifname == b"eth0"
        assert [text.decode() for text in meta.comments or []] == ([comment] if comment else [])
        assert meta.direction == (2 if outgoing else 1)
