"""A real sender, RTP by ffmpeg, through the relay to a real demuxer: health says what the demuxer sees.

One stream as it is, and one of which every 40th datagram is taken out on its way.
"""

import contextlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from netns.lab import Lab, Namespace, eventually
from netns.relay import Relay, rule
from netns.test_health import listening, stream
from netns.traffic import Sender

pytestmark = pytest.mark.netns
SECONDS = 6
CLEAN, IMPAIRED = ("239.1.1.1", "239.2.2.1"), ("239.1.1.2", "239.2.2.2")  # into the relay, and out
LOCAL = 5999
Process = contextlib.AbstractContextManager[subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def ffmpeg() -> None:
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the command ffmpeg (make test)")


@contextlib.contextmanager
def running(namespace: Namespace, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
    words = ["ip", "netns", "exec", namespace.name, "ffmpeg", "-nostdin", "-nostats", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def sender(namespace: Namespace, to: str, options: str) -> Process:
    """A test picture as MPEG-TS in RTP, 25 pictures a second."""
    picture = f"testsrc=size=640x360:rate=25:duration={SECONDS}"
    encoder = ["-c:v", "mpeg2video", "-g", "12", "-b:v", "4M", "-f", "rtp_mpegts"]
    target = f"rtp://{to}?pkt_size=1328&{options}"
    return running(namespace, "-v", "error", "-re", "-f", "lavfi", "-i", picture, *encoder, target)


def player(namespace: Namespace, group: str) -> Process:
    """Demuxes and decodes four seconds; says on stderr what RTP packets it missed, on stdout how many pictures."""
    source = f"rtp://{group}:6000?localaddr=10.1.0.2"
    return running(namespace, "-v", "warning", "-i", source, "-t", "4", "-progress", "pipe:1", "-f", "null", "-")


class Impairment(threading.Thread):
    """Takes datagrams on loopback, and sends them on to a group, but for some."""

    def __init__(self, namespace: Namespace, group: str) -> None:
        super().__init__()
        with namespace.inside():
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", LOCAL))
        self._sock.settimeout(0.2)
        self._sender, self._group = Sender(namespace), group
        self.done, self.came, self.lost = threading.Event(), 0, 0

    def run(self) -> None:
        while not self.done.is_set():
            with contextlib.suppress(TimeoutError):
                self._pass(self._sock.recv(2000))
        self._sock.close()
        self._sender.sock.close()

    def _pass(self, data: bytes) -> None:
        self.came += 1
        if self.came % 40 == 0:
            self.lost += 1
        else:
            self._sender.send(self._group, 5000, [data])


def test_ffmpeg_is_measured_and_received(lab: Lab, figures: Callable[[str], None]) -> None:
    star = lab.star()
    config = "".join(
        rule(name, f"in0:{group}:5000", f"out0:{out}:6000", health="rtp,silence=off")
        for name, (group, out) in (("clean", CLEAN), ("impaired", IMPAIRED))
    )
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(star.relay, config))
        listening(relay)
        players = [stack.enter_context(player(star.sink, out)) for _, out in (CLEAN, IMPAIRED)]
        eventually(lambda: {CLEAN[1], IMPAIRED[1]} <= star.sink.groups("k0"), "the players have joined")
        impairment = Impairment(star.source, IMPAIRED[0])
        impairment.start()
        stack.callback(impairment.join)
        stack.callback(impairment.done.set)
        senders = [
            stack.enter_context(sender(star.source, f"{CLEAN[0]}:5000", "ttl=8&localaddr=10.99.9.1")),
            stack.enter_context(sender(star.source, f"127.0.0.1:{LOCAL}", "")),
        ]
        said = [one.communicate(timeout=40) for one in [*players, *senders]]
        eventually(lambda: stream(relay, "impaired")["silence"] > 1, "all has come")
        clean, impaired = stream(relay, "clean"), stream(relay, "impaired")
    for found in (clean, impaired):
        assert (found["format"], found["seen"], found["bad"], found["restarts"]) == ("rtp+mpegts", "all", 0, 0)
    assert clean["units"] == clean["packets"] > 200
    assert (clean["lost"], clean["duplicates"], clean["details"]["ts_continuity_errors"]) == (0, 0, 0)
    last_was_lost = impairment.came % 40 == 0  # a loss that nothing comes after can't be known
    assert impaired["lost"] == impairment.lost - last_was_lost > 5
    assert impaired["packets"] == impairment.came - impairment.lost
    missed = [sum(map(int, re.findall(r"RTP: missed (\d+) packets", err))) for _, err in said[:2]]
    pictures = [int(re.findall(r"frame=(\d+)", out)[-1]) for out, _ in said[:2]]
    assert missed[0] == 0 and 0 < missed[1] <= impaired["lost"]
    assert all(number >= 50 for number in pictures)
    for name, found, number, gaps in zip(("clean", "impaired"), (clean, impaired), pictures, missed, strict=True):
        keys = ("packets", "units", "lost", "reordered", "duplicates")
        text = ", ".join(f"{key} {found[key]}" for key in keys)
        jitter = f"jitter {1000 * found['jitter']:.1f} ms"
        figures(
            f"ffmpeg, {name}: {text}, {jitter}; the demuxer: {number} pictures in 4 s, {gaps} RTP packets missed"
        )
