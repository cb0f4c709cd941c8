"""Stream health through a running relay: streams with known loss, reordering and duplicates, to the number."""

import json
import os
import random
import signal
import struct
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from netns.frames import udp_frame
from netns.lab import SOURCE, Lab, eventually
from netns.relay import Relay, rule
from netns.traffic import Receiver, Sender, send_frames

pytestmark = pytest.mark.netns
COUNT = 2000
Stream = dict[str, Any]


def rtp(number: int, *, ssrc: int = 7) -> bytes:
    return struct.pack(">BBHII", 0x80, 96, number & 0xFFFF, number * 90, ssrc).ljust(100, b"x")


def field(number: int) -> bytes:
    return struct.pack("<HIH", 9, number, 0)


def mold(number: int) -> bytes:
    """Two messages."""
    return b"SESSION001" + struct.pack(">QH", 2 * number + 1, 2) + b"\0\1a\0\1b"


def with_health(name: str, group: str, health: str) -> str:
    return rule(name, f"in0:{group}:5000", f"out0:{group}:5000") + f'health = "{health}"\n'


def stream(relay: Relay, name: str) -> Stream:
    return next((one for one in relay.get("/v1/streams")["streams"] if one["rule"] == name), {})


def awaited(relay: Relay, name: str, question: Callable[[Stream], bool], what: str) -> Stream:
    """The stream of this rule once `question` holds of it."""
    latest: Stream = {}

    def ask() -> bool:
        latest.clear()
        latest.update(stream(relay, name))
        return bool(latest) and question(latest)

    try:
        eventually(ask, what, 20.0)
    except AssertionError as error:
        error.add_note(json.dumps(latest))
        raise
    return latest


def listening(relay: Relay) -> None:
    """Return when all rules' streams are heard."""
    eventually(lambda: not any(one["problem"] for one in relay.get("/v1/streams")["rules"]), "listening")


def impaired(count: int) -> tuple[list[int], dict[str, int]]:
    """Numbers as they are sent, from 65,000 on; and what is wrong with them."""
    rng = random.Random(5)
    lost = set(rng.sample(range(1, count - 1), count // 20))
    order = [number for number in range(count) if number not in lost]
    for at in range(10, len(order) - 40, 97):  # each of these comes 20 places later
        order.insert(at + 20, order.pop(at))
    reordered = sum(number < max(order[:at], default=-1) for at, number in enumerate(order))
    doubled = rng.sample(range(5, len(order) - 1), count // 50)
    for at in sorted(doubled, reverse=True):
        order.insert(at + 1, order[at])
    counts = {"lost": len(lost), "reordered": reordered, "duplicates": len(doubled)}
    return [65_000 + number for number in order], counts


FORMATS: dict[str, tuple[str, str, Callable[[int], bytes], int]] = {
    "rtp": ("239.1.1.1", "rtp,loss=1%", rtp, 1),
    "auto": ("239.1.1.2", "auto", rtp, 1),
    "sequence": ("239.1.1.3", "sequence,offset=2,size=4,endian=little", field, 1),
    "moldudp64": ("239.1.1.4", "moldudp64", mold, 2),
}


def test_health_is_exact(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    config = "".join(with_health(name, group, health) for name, (group, health, _, _) in FORMATS.items())
    order, counts = impaired(COUNT)
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        listening(relay)
        for name, (group, _, make, each) in FORMATS.items():
            with subtests.test(name):
                skipped = 3 if name == "auto" else 0  # by which it was told
                send(sender, group, [make(number) for number in [*range(64_997, 65_000), *order]][3 - skipped :])
                want = COUNT - counts["lost"]
                found = awaited(relay, name, partial(came, each * want), f"{each * want} units")
                assert found["units"] == each * want
                assert {key: found[key] for key in counts} == {key: each * count for key, count in counts.items()}
                assert (found["seen"], found["missed"], found["excused"], found["bad"]) == ("all", 0, 0, 0)
        with subtests.test("alarm"):
            (alarm,) = eventually(partial(alarms, relay, "rtp", "loss"), "the alarm is raised")
            assert (alarm["raised"], alarm["threshold"], alarm["flow"]["group"]) == (True, 0.01, "239.1.1.1")
            assert alarm["value"] == pytest.approx(0.05, abs=0.001)
        with subtests.test("shown"):
            flows = {flow["group"]: flow["health"] for flow in relay.flows()}
            assert flows["239.1.1.1"].startswith("rtp: ")
            text = star.relay.run(sys.executable, "-m", "mrelay", "health", "rtp", "--socket", str(relay.socket))
            assert "239.1.1.1" in text and "239.1.1.2" not in text and " 100 " in text


def alarms(relay: Relay, rule_: str, name: str) -> list[dict[str, Any]]:
    """Of this rule and name, as far as they were raised."""
    events = [one for one in relay.get("/v1/events")["events"] if one["type"] == "alarm"]
    return [one for one in events if (one["rule"], one["name"]) == (rule_, name)]


def came(units: int, one: Stream) -> bool:
    """Whether so many did."""
    return bool(one["units"] >= units)


def send(sender: Sender, group: str, sent: Iterable[bytes]) -> None:
    """In batches that no buffer is too small for."""
    datagrams = list(sent)
    for at in range(0, len(datagrams), 200):
        sender.send(group, 5000, datagrams[at : at + 200])


def test_merged_frames_are_taken_apart(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, with_health("a", "239.1.1.1", "rtp")) as relay, Sender(star.source) as sender:
        listening(relay)
        with Receiver(star.sink, "k0", 5000, "239.1.1.1") as receiver:
            numbers = [number for number in range(600) if number not in (100, 200, 201)]
            for at in range(0, len(numbers), 60):
                sender.send_segmented("239.1.1.1", 5000, [rtp(number) for number in numbers[at : at + 60]])
            receiver.receive(len(numbers))
        found = awaited(relay, "a", lambda one: one["packets"] == len(numbers), "all")
        assert (found["units"], found["lost"], found["bytes"]) == (597, 3, 597 * 100)


def test_silence_is_an_alarm_until_it_ends(lab: Lab) -> None:
    """That the rule is heard is said first, also where its stream is silent again when that is looked at."""
    star = lab.star()
    with (
        Relay(star.relay, with_health("a", "239.1.1.1", "any,silence=0.5s")) as relay,
        Sender(star.source) as sender,
    ):

        def alarms() -> list[tuple[bool, bool]]:
            events = relay.get("/v1/events")["events"]
            return [(one["flow"] is not None, one["raised"]) for one in events if one["type"] == "alarm"]

        eventually(lambda: alarms() == [(False, True)], "a rule that was never heard")
        assert relay.get("/v1/streams")["rules"][0]["alarms"] == ["silence"]
        sender.send("239.1.1.1", 5000, [b"x"])
        eventually(lambda: alarms() == [(False, True), (False, False), (True, True)], "silence of the stream")
        assert stream(relay, "a")["alarms"] == ["silence"]
        assert "silent" in relay.flows()[0]["health"]

        def back() -> bool:  # one a second would be silent for half of it, whenever that is looked at
            sender.send("239.1.1.1", 5000, [b"x"])
            return alarms()[3:4] == [(True, False)]

        eventually(back, "it is back")


def test_health_of_a_running_rule_comes_and_goes(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay) as relay, Sender(star.source) as sender:
        cli = [sys.executable, "-m", "mrelay"]
        add = ["rule", "add", "a", "--from", "in0:239.1.1.1:5000", "--to", "out0:239.1.1.1:5000"]
        star.relay.run(*cli, *add, "--health", "rtp,jitter=5ms", "--socket", str(relay.socket))
        assert relay.rules()["a"]["health"] == "rtp,jitter=5ms"
        listening(relay)
        sender.send("239.1.1.1", 5000, [rtp(number) for number in range(10)])
        awaited(relay, "a", lambda one: one["units"] == 10, "ten")
        for role in relay.role("control"):
            os.kill(role, signal.SIGKILL)
        eventually(lambda: _rules(relay).get("a", {}).get("health") == "rtp,jitter=5ms", "kept over a restart")
        table = relay.rules()["a"]
        body = {"rules": [{key: table[key] for key in ("name", "from", "to")}]}
        assert relay.request("PUT", "/v1/rules", body)[1]["changed"] == ["a"]
        eventually(lambda: relay.get("/v1/streams") == {"streams": [], "rules": [], "left_out": 0}, "none asks")


def _rules(relay: Relay) -> dict[str, Any]:
    try:
        return relay.rules()
    except OSError:
        return {}


def test_a_sampled_stream_is_heard_now_and_then_and_loses_nothing_meanwhile(lab: Lab) -> None:
    star = lab.star()
    config = with_health("a", "239.1.1.1", "rtp,sample=2,silence=1s")
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        number = 0

        def heard(turns: int) -> bool:
            nonlocal number
            sender.send("239.1.1.1", 5000, [rtp(number + n) for n in range(5)])
            number += 5
            one = stream(relay, "a")
            return (
                bool(one)
                and one["packets"] > 0
                and number > 100 * turns
                and one["excused"] + one["units"] < number
            )

        eventually(lambda: heard(2), "some of it")
        one = stream(relay, "a")
        assert (one["lost"], one["restarts"], one["seen"]) == (0, 0, "sampled")


def test_what_the_tap_missed_is_no_loss(lab: Lab) -> None:
    """More than a tap's buffer holds, while control is stopped: excused, said, and no alarm."""
    star = lab.star()
    config = with_health("a", "239.1.1.1", "rtp")
    with Relay(star.relay, config) as relay:
        listening(relay)
        send_frames(star.source, "s0", [udp_frame(SOURCE, "239.1.1.1", 5000, rtp(number)) for number in range(5)])
        awaited(relay, "a", lambda one: one["units"] == 5, "the first")
        (control,) = relay.role("control")
        big = bytes(1300)
        frames = [udp_frame(SOURCE, "239.1.1.1", 5000, rtp(number) + big) for number in range(5, 8000)]
        os.kill(control, signal.SIGSTOP)
        try:
            send_frames(star.source, "s0", frames)
        finally:
            os.kill(control, signal.SIGCONT)
        packets = [0]

        def all_read() -> bool:
            """Nothing more for two looks in a row: the buffer is empty."""
            packets.append(stream(relay, "a")["packets"])
            return packets[-1] == packets[-2] > 5

        eventually(all_read, "the buffer is read")
        for number in (8000, 8002):
            send_frames(star.source, "s0", [udp_frame(SOURCE, "239.1.1.1", 5000, rtp(number))])
        found = awaited(relay, "a", lambda one: one["missed"] > 0 and one["lost"] == 1, "the end")
        assert found["seen"] == "not all"
        assert found["restarts"] == 0 and found["units"] < 8000
        assert found["alarms"] == []
        assert "not all seen" in relay.flows()[0]["health"]
