"""Streams with known loss, reordering and duplicates: what each format's meter makes of them, to the number."""

import itertools
import random
import struct
from collections.abc import Sequence as Several

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrelay.model.health import Health
from mrelay.protocols import mpegts, rtp
from mrelay.protocols.alarms import HOLD, WINDOW, Alarms, Change, LossRatio
from mrelay.protocols.sequence import WINDOW as NUMBERS
from mrelay.protocols.sequence import Sequence
from mrelay.protocols.stream import Meter, meter_for

# ---- numbers ---------------------------------------------------------------------------------------


@st.composite
def _streams(draw: st.DrawFn) -> tuple[list[int], int, int, int, int]:
    """Numbers as they arrive; and how many are lost, reordered and duplicates; and the first one's value."""
    start, count = draw(st.integers(0, 65535)), draw(st.integers(2, 300))
    rng = random.Random(draw(st.integers()))
    share = draw(st.sampled_from([0, 0.1, 0.4]))
    kept = [0, *(n for n in range(1, count - 1) if rng.random() >= share), count - 1]
    places = [(n + (rng.randrange(60) if n and rng.random() < share else 0), n) for n in kept]
    order = [n for _, n in sorted(places)]
    arrivals: list[int] = []
    for n in order:
        arrivals += [n] * (2 if rng.random() < share / 2 else 1)
    reordered = sum(n < max(order[:at], default=-1) for at, n in enumerate(order))
    return arrivals, start, count - len(kept), reordered, len(arrivals) - len(kept)


@given(_streams(), st.sampled_from([16, 32, 64]))
def test_loss_order_and_duplicates_are_exact(stream: tuple[list[int], int, int, int, int], bits: int) -> None:
    arrivals, start, lost, reordered, duplicates = stream
    one = Sequence(bits)
    for number in arrivals:
        one.add((number + start) % (1 << bits))
    assert (one.lost, one.reordered, one.duplicates) == (lost, reordered, duplicates)
    assert (one.received, one.distinct, one.restarts) == (len(arrivals), len(arrivals) - duplicates, 0)


def feed(numbers: Several[int], bits: int = 16) -> Sequence:
    one = Sequence(bits)
    for number in numbers:
        one.add(number)
    return one


def test_what_comes_before_the_first_is_no_loss_found_again() -> None:
    one = feed([100, 103, 98])
    assert (one.lost, one.reordered) == (2, 1)


def test_a_second_number_far_away_is_a_restart_and_one_alone_is_nothing() -> None:
    one = feed([10, 11, 40000, 12, 13])
    assert (one.lost, one.restarts, one.received, one.distinct) == (0, 0, 5, 4)
    one = feed([10, 11, 40000, 40001, 40003])
    assert (one.lost, one.restarts, one.received, one.distinct) == (1, 1, 5, 5)


def test_wide_numbers_may_lose_more_before_it_is_a_restart() -> None:
    assert feed([1, 5000]).lost == 0, "RFC 3550 A.1: MAX_DROPOUT"
    assert feed([1, 5000], 32).lost == 4998


def test_what_we_missed_ourselves_is_excused() -> None:
    one = feed([1, 2])
    one.excuse()
    for number in (6, 7, 9):
        one.add(number)
    assert (one.lost, one.excused) == (1, 3)
    one.add(4)
    assert (one.lost, one.excused, one.reordered, one.duplicates) == (1, 2, 1, 0)
    one.add(4)
    assert one.duplicates == 1


def test_an_excused_jump_may_be_of_any_length() -> None:
    one = feed([1, 2])
    one.excuse()
    for number in (30000, 30001, 30003):
        one.add(number)
    assert (one.lost, one.restarts) == (1, 0)


def test_an_excuse_ends_with_the_next_number() -> None:
    one = feed([1])
    one.excuse()
    for number in (2, 4):
        one.add(number)
    assert (one.lost, one.excused) == (1, 0)


@given(st.lists(st.tuples(st.integers(0, 65535), st.booleans()), max_size=200))
def test_any_numbers_add_up(numbers: list[tuple[int, bool]]) -> None:
    one = Sequence(16)
    for number, excused in numbers:
        if excused:
            one.excuse()
        one.add(number)
    assert one.lost >= 0 and one.excused >= 0
    assert one.received == len(numbers) >= one.distinct + one.duplicates
    assert one.distinct >= one.reordered


def test_too_late_to_tell_is_counted_as_received_only() -> None:
    one = feed([*range(5000, 5000 + NUMBERS + 1), 4000])
    assert (one.received - one.distinct, one.duplicates, one.reordered) == (1, 0, 0)


# ---- RTP -------------------------------------------------------------------------------------------


def packet(sequence: int, timestamp: int = 0, *, ssrc: int = 7, kind: int = 96, body: bytes = b"x") -> bytes:
    return struct.pack(">BBHII", 0x80, kind, sequence & 0xFFFF, timestamp & 0xFFFFFFFF, ssrc) + body


def give(meter: Meter, datagrams: Several[bytes], times: Several[float] | None = None) -> Meter:
    for at, data in enumerate(datagrams):
        meter.add(data, 0, len(data), times[at] if times else at / 100)
    return meter


def test_rtp_loss_is_exact_across_the_wrap() -> None:
    numbers = [65530, 65531, 65533, 65532, 65533, 0, 3]
    found = give(meter_for(Health("rtp")), [packet(n) for n in numbers]).figures()
    assert (found.units, found.lost, found.reordered, found.duplicates) == (6, 4, 1, 1)


def test_jitter_is_that_of_rfc_3550() -> None:
    """Against A.8's own integer arithmetic, whose estimate is kept times 16."""
    rng = random.Random(1)
    clock, times, stamps = 90_000, [], []
    for n in range(500):
        times.append(1000 + n / 50 + rng.random() / 200)
        stamps.append((4_294_900_000 + n * clock // 50) & 0xFFFFFFFF)  # wraps
    transit = [round(time * clock) - stamp for time, stamp in zip(times, stamps, strict=True)]
    scaled = 0
    for before, after in itertools.pairwise(transit):
        difference = abs((after - before + (1 << 31)) % (1 << 32) - (1 << 31))
        scaled += difference - ((scaled + 8) >> 4)
    one = rtp.RtpStream()
    for n, (time, stamp) in enumerate(zip(times, stamps, strict=True)):
        one.add(packet(n, stamp), 0, 13, time)
    assert one.jitter * clock == pytest.approx(scaled / 16, rel=0.02)


def test_a_steady_stream_has_no_jitter_at_its_own_clock() -> None:
    times = [n / 50 for n in range(200)]
    datagrams = [packet(n, n * 960) for n in range(200)]
    assert give(meter_for(Health("rtp", clock=48_000)), datagrams, times).figures().jitter == pytest.approx(
        0, abs=1e-9
    )
    assert (give(meter_for(Health("rtp")), datagrams, times).figures().jitter or 0) > 0.005, "taken for 90 kHz"
    l16 = [packet(n, n * 882, kind=10) for n in range(200)]
    assert give(meter_for(Health("rtp")), l16, times).figures().jitter == pytest.approx(0, abs=1e-9), "RFC 3551"


def test_another_ssrc_is_no_loss() -> None:
    datagrams = [packet(n) for n in (1, 2)] + [packet(n, ssrc=9) for n in (40000, 40002)]
    found = give(meter_for(Health("rtp")), datagrams).figures()
    assert (found.lost, found.restarts, found.details["ssrc_changes"], found.details["ssrc"]) == (1, 0, 1, 9)


def test_what_is_no_rtp_is_bad() -> None:
    rtcp = struct.pack(">BBH", 0x80, 200, 1) + bytes(12)
    padded_too_far = bytes([0xA0]) + packet(1)[1:-1] + b"\xff"
    found = give(meter_for(Health("rtp")), [b"", b"\x40" + bytes(20), rtcp, padded_too_far]).figures()
    assert (found.units, found.bad) == (0, 4)


def test_the_payload_lies_behind_sources_and_extension_and_before_padding() -> None:
    data = bytes([0xB2]) + packet(1)[1:12] + bytes(8) + struct.pack(">HH", 1, 2) + bytes(8) + b"body" + b"\0\0\3"
    head = rtp.header(data, 0, len(data))
    assert head is not None and data[head.start : head.end] == b"body"


# ---- MPEG-TS ---------------------------------------------------------------------------------------


def ts(pid: int, counter: int, *, control: int = 1, jump: bool = False) -> bytes:
    """A transport packet; `control` 1 payload, 2 adaptation field, 3 both; `jump` sets discontinuity_indicator."""
    head = struct.pack(">BHB", 0x47, pid, control << 4 | counter & 15)
    field = bytes([1, 0x80 * jump]) if control & 2 else b""
    return (head + field).ljust(188, b"\xff")


def seven(first: int) -> bytes:
    return b"".join(ts(256, first + n) for n in range(7))


def test_ts_counters_are_followed_for_each_pid() -> None:
    good = ts(256, 0) + ts(257, 9) + ts(256, 1) + ts(8191, 5) + ts(256, 1, control=2) + ts(257, 10) + ts(256, 2)
    found = give(meter_for(Health("mpegts")), [good]).figures()
    assert (found.units, found.lost, found.details["ts_null_packets"], found.details["ts_pids"]) == (6, 0, 1, 2)


def test_ts_loss_of_a_datagram_is_seven_packets() -> None:
    found = give(meter_for(Health("mpegts")), [seven(0), seven(7), seven(21)]).figures()
    assert (found.units, found.lost, found.details["ts_continuity_errors"]) == (21, 7, 1)


@pytest.mark.parametrize(
    ("packets", "what"),
    [
        ([ts(1, 3), ts(1, 3), ts(1, 4)], "duplicates"),
        ([ts(1, 3), ts(1, 9, control=3, jump=True), ts(1, 10)], "discontinuities"),
        ([ts(1, 3), ts(1, 3), ts(1, 3)], "continuity_errors"),
        ([ts(1, 3), ts(1, 4, control=2)], "continuity_errors"),
        ([ts(1, 3), b"\x48" + ts(1, 4)[1:], ts(1, 4)], "bad"),
        ([ts(1, 3), ts(0x8001, 4), ts(1, 4)], "bad"),
    ],
)
def test_ts_oddities_have_a_name(packets: list[bytes], what: str) -> None:
    details = give(meter_for(Health("mpegts")), packets).figures().details
    odd = {key for key in details if details[key] and key not in ("ts_packets", "ts_pids", "ts_missing")}
    assert odd - {"ts_duplicates"} <= {f"ts_{what}"}
    assert details[f"ts_{what}"] == 1


def test_ts_after_a_gap_of_ours_is_not_held_against_the_stream() -> None:
    meter = give(meter_for(Health("mpegts")), [seven(0)])
    meter.excuse()
    assert give(meter, [seven(3)]).figures().lost == 0


def test_ts_in_rtp_is_measured_twice() -> None:
    datagrams = [packet(n, kind=rtp.MP2T, body=seven(7 * n)) for n in (0, 1, 3)]
    meter = give(meter_for(Health("rtp")), datagrams)
    found = meter.figures()
    assert meter.format == "rtp+mpegts"
    assert (found.units, found.lost, found.details["ts_missing"]) == (3, 1, 7)


# ---- market data -----------------------------------------------------------------------------------


def mold(number: int, *messages: bytes, session: bytes = b"SESSION001", count: int | None = None) -> bytes:
    body = b"".join(struct.pack(">H", len(message)) + message for message in messages)
    return session + struct.pack(">QH", number, len(messages) if count is None else count) + body


def test_moldudp64_counts_messages() -> None:
    datagrams = [mold(1, b"a", b"b"), mold(3, b"c"), mold(6, b"d"), mold(9, count=0), mold(9, count=0xFFFF)]
    found = give(meter_for(Health("moldudp64")), datagrams).figures()
    assert (found.units, found.lost) == (4, 2 + 2), "two before 6, and 7 and 8, as the heartbeat says"


def test_a_message_that_comes_after_the_heartbeat_is_found_again() -> None:
    found = give(meter_for(Health("moldudp64")), [mold(1, b"a"), mold(3, count=0), mold(2, b"b")]).figures()
    assert (found.units, found.lost, found.reordered) == (2, 0, 1)


def test_another_session_begins_anew() -> None:
    found = give(meter_for(Health("moldudp64")), [mold(900, b"a"), mold(1, b"b", session=b"SESSION002")]).figures()
    assert (found.lost, found.details["session_changes"]) == (0, 1)


@pytest.mark.parametrize("endian", ["big", "little"])
def test_a_field_anywhere(endian: str) -> None:
    form = ">HIH" if endian == "big" else "<HIH"
    health = Health("sequence", offset=2, size=4, endian=endian, count_offset=6, count_size=2)  # type: ignore[arg-type]
    datagrams = [struct.pack(form, 9, number, count) for number, count in ((10, 3), (13, 1), (15, 2))]
    found = give(meter_for(health), [*datagrams, b"short"]).figures()
    assert (found.units, found.lost, found.bad) == (6, 1, 1)


# ---- finding out -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datagrams", "want"),
    [
        ([packet(n) for n in range(40)], "rtp"),
        ([packet(n, kind=33, body=seven(7 * n)) for n in range(40)], "rtp+mpegts"),
        ([seven(7 * n) for n in range(40)], "mpegts"),
        ([mold(n, b"abc") for n in range(40)], "moldudp64"),
        ([struct.pack(">Q", n) for n in range(40)], "any"),
        ([bytes([128]) * 30 for _ in range(40)], "any"),
    ],
)
def test_auto_finds_the_format(datagrams: list[bytes], want: str) -> None:
    meter = give(meter_for(Health("auto")), datagrams)
    assert meter.format == want
    assert meter.figures().lost in (None, 0)


@settings(max_examples=50)
@given(st.sampled_from(["auto", "rtp", "mpegts", "moldudp64"]), st.lists(st.binary(max_size=60), max_size=40))
def test_any_datagrams_are_measured(format_: str, datagrams: list[bytes]) -> None:
    figures = give(meter_for(Health(format_)), datagrams).figures()  # type: ignore[arg-type]
    assert figures.lost is None or figures.lost >= 0


def test_looks_like_ts() -> None:
    assert mpegts.looks_like(seven(0), 0, 7 * 188)
    assert not mpegts.looks_like(seven(0), 0, 187)
    assert not mpegts.looks_like(seven(0), 0, 189)


# ---- alarms ----------------------------------------------------------------------------------------


def test_an_alarm_is_raised_at_once_and_cleared_after_a_while() -> None:
    alarms = Alarms({"loss": 0.01, "silence": 5})
    assert alarms.judge({"loss": 0.01, "jitter": 9, "silence": 1}, 0) == []
    assert alarms.judge({"loss": 0.02}, 1) == [Change("loss", True, 0.02, 0.01)]
    assert alarms.judge({"loss": 0.03}, 2) == []
    assert alarms.judge({"loss": None}, 2 + HOLD["loss"]) == [], "what is not known changes nothing"
    assert alarms.judge({"loss": 0.0}, 1.9 + HOLD["loss"]) == []
    assert alarms.judge({"loss": 0.0}, 2 + HOLD["loss"]) == [Change("loss", False, 0.0, 0.01)]
    assert alarms.judge({"loss": 0.02}, 30) == [Change("loss", True, 0.02, 0.01)]


def test_a_stream_that_is_back_is_not_silent() -> None:
    alarms = Alarms({"silence": 5})
    assert [change.raised for change in alarms.judge({"silence": 6}, 6)] == [True]
    assert [change.raised for change in alarms.judge({"silence": 0.1}, 6.1)] == [False]


def test_the_loss_ratio_is_that_of_the_last_seconds() -> None:
    ratio = LossRatio()
    assert ratio.tick(90, 10) == 0.1
    assert ratio.tick(190, 10) == 0.05
    for _ in range(WINDOW + 1):
        last = ratio.tick(290, 10)
    assert last == 0, "nothing came"
    assert ratio.tick(300, 5) == 0, "what was lost came after all"
