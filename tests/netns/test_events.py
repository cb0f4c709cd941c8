"""Events of a real relay: what happens to it is told once, and `mrelay events --follow` sees it through."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from netns.lab import SOURCE, Lab, eventually
from netns.relay import Relay, rule
from netns.traffic import Sender, payloads

pytestmark = pytest.mark.netns

GROUP = "239.1.1.1"
CONFIG = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000,ttl=8")


class Follower:
    """`mrelay events --follow --json`; `seen` is what it has printed."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process, self.seen = process, list[dict[str, Any]]()
        self._left = b""

    def until(self, kind: str, **fields: object) -> dict[str, Any]:
        """The first event of this kind with these fields that has not been asked for yet."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            while self.seen:
                event = self.seen.pop(0)
                if event["type"] == kind and fields.items() <= event.items():
                    return event
            self._read(deadline - time.monotonic())
        raise AssertionError(f"no event {kind} {fields}")

    def _read(self, seconds: float) -> None:
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], max(0.0, seconds))[0]:
            *lines, self._left = (self._left + os.read(self._process.stdout.fileno(), 65536)).split(b"\n")
            self.seen += map(json.loads, lines)


@contextmanager
def following(relay: Relay) -> Iterator[Follower]:
    arguments = [sys.executable, "-m", "mrelay", "events", "--follow", "--json", "--socket", str(relay.socket)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield Follower(process)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130


def test_what_happens_is_told(lab: Lab) -> None:
    star = lab.star()
    with Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay, following(relay) as events:
        assert not events.until("control_started")["took_over"]
        events.until("rule_up", rule="a")
        sender.send(GROUP, 5000, payloads(5))
        flow = {"interface": "in0", "vlan": None, "source": SOURCE, "group": GROUP, "port": 5000}
        assert events.until("flow_appeared")["flow"] == flow
        sender.send(GROUP, 5001, payloads(50))
        assert events.until("drops_rising", reason="no_rule")["total"] == 50
        relay.add_rule("b", "in0:239.1.1.2:5000", "out0:239.2.2.3:6000")
        events.until("rule_added", rule="b")

        star.relay.ip("link set out0 down")
        events.until("interface_down", interface="out0", gone=False)
        events.until("rule_waiting", rule="a", reason="waiting: out0 is down")
        star.relay.ip("link set out0 up")
        events.until("interface_up", interface="out0")
        events.until("rule_up", rule="a")

        pid = relay.workers()[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        events.until("worker_died", worker=0, restarts=1, reason="signal SIGKILL")
        assert events.until("worker_started", worker=0, restarts=1)["pid"] != pid

        (control,) = relay.role("control")
        os.kill(control, signal.SIGKILL)
        assert events.until("control_started")["took_over"]
        eventually(lambda: relay.role("control") not in ([], [control]), "control is back")
        relay.remove_rule("b")
        events.until("rule_removed", rule="b")
