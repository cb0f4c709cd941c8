"""What why makes of frames: any bytes are counted in one place, and every stream can be judged."""

from fuzz.data import Data
from mrelay.diagnose.traffic import Traffic, differs, matching, near, portless
from mrelay.kernel.tap import Frame
from mrelay.model.endpoint import Input

_WANTED = (Input.parse("in0:239.1.1.1:5000"), Input.parse("in0:[ff3e::1]:5000,vlan=20"))
_STARTS = (
    b"",
    bytes.fromhex("01005e0101010200000000010800450000200001400010112f1f0a010109ef01010111940fa0000c0000"),
    bytes.fromhex("33330000000102000000000186dd6000000000081110fd00000000000000000000000000000a"),
)


def check(data: bytes) -> None:
    source, traffic, frames = Data(data), Traffic(), 0
    while source and frames < 50:
        frames += 1
        body = source.pick(_STARTS) + source.some()
        network, segment = source.pick((0, 14, 18, 300)), source.pick((0, 1, 100, 65535))
        length = len(body) + source.pick((0, 1, 1400))
        vlan = source.pick((None, 0, 20, 4095))
        traffic.add(Frame(0, vlan, body, network, length, segment, False, source.pick((True, False)), 0))
    assert traffic.unreadable + traffic.more + sum(s.datagrams > 0 for s in traffic.streams.values()) <= frames
    assert all(stream.datagrams > 0 for stream in traffic.streams.values())
    for wanted in _WANTED:
        found = {name for name, _ in matching(traffic, wanted) + portless(traffic, wanted)}
        assert found == {name for name in traffic.streams if not differs(name, wanted)}
        assert not found & {name for name, _, _ in near(traffic, wanted)}
        assert all(str(name) for name in traffic.streams)
