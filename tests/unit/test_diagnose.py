"""The pure part of `why`: what was heard against what is wanted, and the walk through the stages."""

from dataclasses import replace
from typing import Any

import pytest

from mrelay.diagnose.facts import UP, Bridge, Facts, Flow, Join, Link, Output, Querier, Worker
from mrelay.diagnose.finding import span
from mrelay.diagnose.stages import STAGES, judge
from mrelay.diagnose.traffic import Name, Traffic, differs, matching, near
from mrelay.kernel.tap import Frame
from mrelay.model.config import parse_rules
from mrelay.model.endpoint import Input
from netns.frames import ethernet, ipv4, multicast_mac, udp, udp_frame

SOURCE, GROUP = "10.1.1.9", "239.1.1.1"
(RULE,) = parse_rules([{"name": "a", "from": f"in0:{GROUP}:5000", "to": ["out0:239.2.2.2:6000"]}], "")
IN, OUT = Link("in0", 2, True, True, True, 1500), Link("out0", 3, True, True, True, 1500)


def frame(data: bytes, *, vlan: int | None = None, segment: int = 0, complete: bool = True) -> Frame:
    return Frame(1, vlan, data, 14, len(data), segment, False, complete, 0)


def heard(*frames: Frame) -> Traffic:
    traffic = Traffic()
    for one in frames:
        traffic.add(one)
    return traffic


GOOD = heard(*[frame(udp_frame(SOURCE, GROUP, 5000, bytes(100)))] * 9)


def facts(**different: Any) -> Facts:
    """Of a rule that forwards, but for this."""
    output = Output("out0:239.2.2.2:6000", UP, OUT, 4, True, None, 9, 0, 99)
    healthy: dict[str, Any] = {
        "rule": RULE, "others": (), "seconds": 0.5, "state": UP, "link": IN, "deaf": "",
        "joins": (Join(GROUP, None, "", True),), "warning": "", "querier": None, "listened": 9.0,
        "traffic": GOOD, "elsewhere": {}, "blind": "", "revived": False, "own": frozenset(),
        "workers": (Worker(0, "running", 0),), "flows": (Flow(SOURCE, GROUP, 5000, "ebpf", "", 99),),
        "outputs": (output,), "drops": {}, "counted": 9, "total": 99, "last": 0.1, "since": 60.0,
    }  # fmt: skip
    return Facts(**{**healthy, **different})


SILENT: dict[str, Any] = {"traffic": Traffic(), "counted": 0, "flows": (), "last": None}
BRIDGED = replace(IN, bridge=Bridge("br0", True, False))
HIDDEN = [
    ("membership", {"joins": (Join(GROUP, None, "", False),)}),
    ("querier", {**SILENT, "link": BRIDGED}),
    ("querier", {"revived": True}),
    ("interface", {"link": replace(IN, multicast=False)}),
    ("interface", {"deaf": "no descriptors — raise ulimit -n", "joins": (Join(GROUP, None, "", False),)}),
    ("loop", {"drops": {"loop": 9}, "own": frozenset({0x0A010109})}),
    ("limits", {"drops": {"ring_full": 9}, "counted": 3}),
    ("limits", {"drops": {"miss_limited": 9}, "counted": 3}),
    ("outputs", {"outputs": (replace(facts().outputs[0], errors=3),)}),
    ("outputs", {"outputs": (replace(facts().outputs[0], sent=0),)}),
    ("outputs", {"outputs": (replace(facts().outputs[0], link=replace(OUT, carrier=False)),)}),
    ("forwarding", {"counted": 0}),
    ("forwarding", {"counted": 0, "drops": {"tx_error": 9}}),
    ("frames", {**SILENT, "elsewhere": {"in1": 4}}),
    ("frames", SILENT),
]


def test_healthy() -> None:
    answer = judge(facts())
    assert (answer.verdict, answer.stage) == ("forwarding", "")
    assert list(answer.findings) == [name for name, _ in STAGES]
    assert "60 s" in answer.summary


@pytest.mark.parametrize(("stage", "different"), HIDDEN)
def test_it_stops_at_the_first_stage_that_fails_with_a_remedy(stage: str, different: dict[str, Any]) -> None:
    answer = judge(facts(**different))
    names = [name for name, _ in STAGES]
    assert answer.stage == stage
    assert answer.findings[stage].remedy
    behind = names[names.index(stage) + 1 :]
    assert {answer.findings[name].status for name in behind} <= {"skipped"}
    assert "failed" not in {answer.findings[name].status for name in names[: names.index(stage)]}


FINE = [
    {"querier": Querier("10.1.1.1", "IGMPv3", 3.0)},
    {"link": BRIDGED},  # frames come all the same
    {"traffic": Traffic(), "flows": (Flow(SOURCE, GROUP, 5000, "xdp", "", 99),)},
    {"blind": "64 taps are open", "traffic": Traffic()},
    {"drops": {"ring_full": 9, "rate_limited": 7, "loop": 3, "no_rule": 5, "ttl_expired": 4}},  # of other rules
    {"joins": (Join(GROUP, SOURCE, "", None),)},
    {"joins": (), "warning": "prefix too wide to join: relies on static membership"},
]


@pytest.mark.parametrize("different", FINE)
def test_no_false_alarm(different: dict[str, Any]) -> None:
    assert judge(facts(**different)).stage == ""


def test_who_cannot_look_says_so() -> None:
    answer = judge(facts(**{**SILENT, "blind": "64 taps are open"}))
    assert answer.findings["frames"].status == "unknown"
    assert answer.stage == "forwarding"


WANTED = Input.parse(f"in0:{SOURCE}@{GROUP}:5000-5009")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (Name(None, 4, 0x0A010109, 0xEF010101, 17, 5009), ()),
        (Name(None, 4, 0x0A010109, 0xEF010101, 17, 5010), ("port",)),
        (Name(20, 4, 0x0A010108, 0xEF010101, 17, 5000), ("source", "VLAN")),
        (Name(None, 4, 0x0A010109, 0xEF010101, 6, 0), ("protocol",)),
        (Name(None, 6, 1, 2, 17, 5000), ("source", "group")),
    ],
)
def test_differences(name: Name, what: tuple[str, ...]) -> None:
    assert differs(name, WANTED) == what


def test_near_misses_come_nearest_first_and_others_streams_are_none() -> None:
    traffic = heard(
        frame(udp_frame(SOURCE, "239.1.9.1", 5000, b"another group, one number off")),
        frame(udp_frame(SOURCE, "239.9.9.1", 5000, b"too far off")),
        frame(udp_frame(SOURCE, GROUP, 5001, b"port"), vlan=20),
        frame(udp_frame(SOURCE, GROUP, 5001, b"port")),
        frame(udp_frame(SOURCE, GROUP, 5002, b"another rule's")),
    )
    wanted, taken = Input.parse(f"in0:{GROUP}:5000"), (Input.parse(f"in0:{GROUP}:5002"),)
    assert [what for _, _, what in near(traffic, wanted, taken)] == [("port",), ("group",), ("port", "VLAN")]
    assert not matching(traffic, wanted)


def test_merged_datagrams_are_counted_one_by_one() -> None:
    merged = frame(udp_frame(SOURCE, GROUP, 5000, bytes(2500)), segment=1000, complete=False)
    ((_, stream),) = matching(heard(merged), RULE.from_)
    assert (stream.datagrams, stream.longest, stream.checked) == (3, 1028, 0)


def test_checksums_are_judged_only_where_they_are() -> None:
    bad = bytearray(udp_frame(SOURCE, GROUP, 5000, b"x" * 50))
    bad[-1] ^= 1
    none = udp(SOURCE, GROUP, 1, 5000, b"x")
    none = ethernet(multicast_mac(GROUP), ipv4(SOURCE, GROUP, none[:6] + b"\0\0" + none[8:]))
    traffic = heard(frame(bytes(bad)), frame(bytes(bad), complete=False), frame(none), frame(bytes(bad[:60])))
    ((_, stream),) = matching(traffic, RULE.from_)
    assert (stream.datagrams, stream.checked, stream.checksums_bad, stream.headers_bad) == (4, 1, 1, 0)


def test_spans() -> None:
    assert [span(seconds) for seconds in (0.52, 12, 200, 9000, 300000)] == [
        "0.5 s",
        "12 s",
        "3 min",
        "2 h",
        "3 days",
    ]
