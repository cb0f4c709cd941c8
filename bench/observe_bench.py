"""What being observed costs: how much a relay forwards under overload, watched and not, in turn.

`python bench/observe_bench.py [--help]`, as root. One relay for each engine; watched means that each second
somebody asks for /metrics and for what the web page asks for, and that an event stream is open. Whoever watches
may have no core of its own, so that its work is counted, too. Prints medians and spread, and the processor time of
each role, which other work on the machine disturbs less than the rate. Blocks until done.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import lab as labs
import peers
from cases import Case
from relays import Relay, running
from traffic import Programs, XdpSource, frame

PEERS: Final = {"ebpf": "mrelay-tc", "uring": "mrelay-uring"}
PAGE: Final = ("/v1/stats", "/v1/rules", "/v1/flows?limit=200", "/v1/health")
WARM: Final = 0.7  # seconds of load before counting
FEW: Final = 12_000  # datagrams a second: flows are learnt at this rate


class Turn(NamedTuple):
    """Datagrams out a second; processor time of each process over time, by its name in /metrics."""

    out: float
    busy: dict[str, float]


def main() -> int:
    """Measure both engines, or those asked for, and print."""
    options = _parser().parse_args()
    if options.watch:
        _watch(options.watch)
    cores = labs.Cores.chosen(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores.source})
    found = {engine: _measure(engine, cores, options) for engine in options.engines}
    for engine, (off, on) in found.items():
        _print(engine, off, on)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", nargs="+", choices=PEERS, default=list(PEERS))
    add("--rounds", type=int, default=8, help="times each is measured, watched and not (default %(default)s)")
    add("--seconds", type=float, default=3.0, help="of each measurement (default %(default)s)")
    add("--pps", type=float, default=3e6, help="datagrams offered a second (default %(default)g)")
    add("--json", metavar="FILE", help="write all figures")
    add("--watch", metavar="SOCKET", type=Path, help=argparse.SUPPRESS)  # this program as the one that watches
    return parser


def _measure(engine: str, cores: labs.Cores, options: argparse.Namespace) -> tuple[list[Turn], list[Turn]]:
    peer = next(peer for peer in peers.load() if peer.name == PEERS[engine])
    case, turns = Case(), (list[Turn](), list[Turn]())
    with (
        labs.Lab() as lab,
        Programs(case.payload, case.flows) as programs,
        running(peer, lab, case, cores) as relay,
    ):
        with labs.inside(lab.sink):
            programs.attach(lab.sink_indexes())
        lab.thread_napi(cores)
        frames = [frame(flow, case.payload) for flow in case.traffic()]
        source = XdpSource(programs, frames, "s0", partial(labs.inside, lab.source))
        with source.offering(FEW, 1.0):
            time.sleep(1.2)
        for number in range(2 * options.rounds):
            watched = number % 4 in (1, 2)  # off on on off: drift falls on both
            with _watching(relay, cores) if watched else contextlib.nullcontext():
                turns[watched].append(_turn(source, programs, relay, options))
    return turns


def _turn(source: XdpSource, programs: Programs, relay: Relay, options: argparse.Namespace) -> Turn:
    with source.offering(options.pps, WARM + options.seconds + 0.3):
        time.sleep(WARM)
        before, start, came = _busy(relay), time.monotonic(), sum(programs.datagrams())
        time.sleep(options.seconds)
        out, seconds = sum(programs.datagrams()) - came, time.monotonic() - start
        after = _busy(relay)
    programs.drained()
    return Turn(out / seconds, {name: (after[name] - before[name]) / seconds for name in after})


def _busy(relay: Relay) -> dict[str, float]:
    """Seconds of processor time so far, by process."""
    text = _get(relay.directory / "control.sock", "/metrics").decode()
    found = re.findall(r'mrelay_process_cpu_seconds_total\{process="([a-z0-9-]+)"\} (\S+)', text)
    return {name: float(value) for name, value in found}


def _get(path: Path, target: str) -> bytes:
    with contextlib.closing(http.client.HTTPConnection("localhost", timeout=30)) as connection:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", target)
        return connection.getresponse().read()


@contextlib.contextmanager
def _watching(relay: Relay, cores: labs.Cores) -> Iterator[None]:
    command = [sys.executable, __file__, "--watch", str(relay.directory / "control.sock")]
    with subprocess.Popen(["taskset", "-c", str(cores.sink), *command], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"watching\n":
                raise RuntimeError("whoever should watch ended")
            yield
            if process.poll() is not None:
                raise RuntimeError("whoever should watch ended")
        finally:
            process.kill()


def _watch(path: Path) -> None:
    """Until killed."""
    with socket.socket(socket.AF_UNIX) as events:
        events.connect(str(path))
        events.sendall(b"GET /v1/events/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        print("watching", flush=True)
        while True:
            start = time.monotonic()
            for target in ("/metrics", *PAGE):
                _get(path, target)
            with contextlib.suppress(BlockingIOError):  # nothing happened
                events.recv(1 << 16, socket.MSG_DONTWAIT)
            time.sleep(max(0.0, start + 1 - time.monotonic()))


def _print(engine: str, off: list[Turn], on: list[Turn]) -> None:
    plain, watched = (sorted(turn.out for turn in turns) for turns in (off, on))
    ratio = statistics.median(watched) / statistics.median(plain)
    print(f"{engine}: datagrams out a second, median (least to most) of {len(off)}")
    for name, values in (("not watched", plain), ("watched", watched)):
        print(f"  {name:<12} {statistics.median(values):>12,.0f}  ({values[0]:,.0f} to {values[-1]:,.0f})")
    print(f"  watched / not watched: {ratio:.3f}")
    for name in off[0].busy:
        before, after = (statistics.median(turn.busy[name] for turn in turns) for turns in (off, on))
        print(f"  {name}: {before:.1%} of a core, watched {after:.1%}")


if __name__ == "__main__":
    sys.exit(main())
