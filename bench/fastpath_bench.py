"""What the kernel's fast path costs as it grows: flows, rules, outputs, and the time until a new rule forwards.

The command `python bench/fastpath_bench.py [--help]`, as root; throughput beside other relays is relay_bench.py's.
Everything happens in namespaces of its own, which are removed at the end. Each figure is printed with what it is
measured against. Blocks until done. Exit code: 0 measured, 1 failed, or with --check a missed target.
"""

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from rich.console import Console
from rich.table import Table

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from netns.lab import Lab, Star, eventually  # noqa: E402  the paths above come first, for all of these
from netns.relay import Relay, rule  # noqa: E402
from netns.traffic import Capture, Sender, payloads  # noqa: E402
from traffic import Flow, Sink, Source  # noqa: E402

SIZE: Final = 200  # bytes of payload
GROUP: Final = "239.1.1.1"
SOURCE: Final = "10.99.9.1"
Row = tuple[str, str, str, bool]  # what, measured, target, whether it is met


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print."""
    options = _parser().parse_args(arguments)
    if os.geteuid():
        print("error: needs root for namespaces and BPF; remedy: sudo", file=sys.stderr)
        return 1
    console = Console()
    parts: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
        "flows": cost_by_flows,
        "rules": many_rules,
        "first": first_packet,
        "outputs": wide_fan_out,
    }
    rows: list[Row] = []
    for name in options.parts or parts:
        console.print(f"measuring: {name}", style="dim")
        rows += parts[name](options)
    table = Table("what", "measured", "target", "")
    for what, measured, target, met in rows:
        table.add_row(what, measured, target, "met" if met else "missed")
    console.print(table)
    return int(options.check and not all(met for *_, met in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="what the kernel's fast path costs as it grows")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="flows, rules, first, outputs; none: all")
    add("--rounds", type=int, default=5, help="of each measurement, interleaved (default %(default)s)")
    add("--rules", type=int, default=10_000, help="rules to load, and flows to install (default %(default)s)")
    add("--outputs", type=int, default=1000, help="unicast outputs of one rule (default %(default)s)")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    return parser


def _star(lab: Lab) -> Star:
    """With NAPI at every receiving end, which live frames need, and GRO for none of them."""
    star = lab.star(offload=True)
    for namespace, interface in ((star.relay, "in0"), (star.sink, "k0")):
        namespace.run("ethtool", "-K", interface, "gro", "on")
    return star


# ---- flows -------------------------------------------------------------------------------------------


def cost_by_flows(options: argparse.Namespace) -> Iterator[Row]:
    """Datagrams a second of one flow, with one flow installed and with many; rounds alternate."""
    with Lab() as lab:
        star = _star(lab)
        config = "[relay]\ngro = false\n\n" + rule("all", "in0:239.0.0.0/8:5000", "out0:*:*")
        rates: dict[str, list[float]] = {"one": [], "many": []}
        for _ in range(options.rounds):
            with Relay(star.relay, config) as relay:
                rates["one"].append(_rate(star, relay))
                _install(star, relay, options.rules)
                rates["many"].append(_rate(star, relay))
    one, many = median(rates["one"]), median(rates["many"])
    cost = one / many - 1
    figures = f"{one / 1e3:,.0f} k/s and {many / 1e3:,.0f} k/s: {cost:+.1%}"
    yield f"cost of a datagram, 1 and {options.rules:,} flows installed", figures, "within 10 %", cost <= 0.1


def _install(star: Star, relay: Relay, count: int) -> None:
    """Have so many flows installed: two datagrams each, the second of which the kernel carries."""
    with Sender(star.source) as sender:
        for _ in range(2):
            for n in range(count):
                sender.send(f"239.7.{n // 250}.{n % 250 + 1}", 5000, [b"x" * 16])
                if n % 500 == 0:
                    time.sleep(0.03)  # below the rate at which new flows are taken
    eventually(lambda: relay.stats()["flows"] >= count, f"{count} flows", 60)


def _rate(star: Star, relay: Relay, seconds: float = 1.5) -> float:
    """Datagrams a second out of the relay when more are offered than it can take."""
    with star.sink.inside():
        sink = Sink([socket.if_nametoindex("k0")], SIZE)
    with sink, star.source.inside():
        source = Source(socket.if_nametoindex("s0"), [Flow(SOURCE, GROUP, 5000)], SIZE, 2e6)
        with source.offering(seconds + 1.0):
            time.sleep(0.8)
            start, before = time.monotonic(), sink.segments()[0]
            time.sleep(seconds)
            rate = (sink.segments()[0] - before) / (time.monotonic() - start)
    engines = {flow["engine"] for flow in relay.flows() if flow["group"] == GROUP}
    if engines != {"ebpf"}:
        raise RuntimeError(f"the flow was carried by {engines}")
    return rate


# ---- rules -------------------------------------------------------------------------------------------


def many_rules(options: argparse.Namespace) -> Iterator[Row]:
    """From the request that brings the rules to its answer, when all are in force and joined."""
    tables = [
        {
            "name": f"r{n}",
            "from": f"in0:239.3.{n // 250}.{n % 250}:5000",
            "to": [f"out0:239.100.{n // 250}.{n % 250}:6000"],
        }
        for n in range(options.rules)
    ]
    with Lab() as lab:
        star = _star(lab)
        with Relay(star.relay, rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")) as relay:
            start = time.monotonic()
            status, answer = relay.request("PUT", "/v1/rules", {"rules": tables})
            seconds = time.monotonic() - start
            if status != 200 or len(answer["added"]) != options.rules:
                raise RuntimeError(f"rules were refused: {status} {answer}")
    yield f"{options.rules:,} rules loaded", f"{seconds:.2f} s", "under 2 s", seconds < 2


def first_packet(options: argparse.Namespace) -> Iterator[Row]:
    """From the request that adds a rule to the first datagram of a running stream at the receiver."""
    delays: list[float] = []
    with Lab() as lab:
        star = _star(lab)
        stop = threading.Event()
        with (
            Sender(star.source) as sender,
            Relay(star.relay, rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")) as relay,
            Capture(star.sink, "k0") as wire,
        ):
            stream = threading.Thread(target=_stream, args=(sender, stop))
            stream.start()
            for n in range(4 * options.rounds):
                start = time.monotonic()
                request = threading.Thread(
                    target=relay.add_rule, args=(f"r{n}", f"in0:239.9.9.{n}:5000", f"out0:239.8.8.{n}:6000")
                )
                request.start()
                while wire.wait(1, 60)[-1].destination != f"239.8.8.{n}":
                    pass
                delays.append(time.monotonic() - start)
                request.join()
                relay.remove_rule(f"r{n}")
            stop.set()
            stream.join()
    found = median(delays)
    figures = f"{found * 1e3:.1f} ms (worst of {len(delays)}: {max(delays) * 1e3:.1f})"
    yield "rule added to first datagram forwarded", figures, "under 10 ms", found < 0.01


def _stream(sender: Sender, stop: threading.Event) -> None:
    """A datagram to each of 40 groups every 2 ms."""
    while not stop.wait(0.002):
        for n in range(40):
            sender.send(f"239.9.9.{n}", 5000, [b"x" * 64])


# ---- outputs -----------------------------------------------------------------------------------------


def wide_fan_out(options: argparse.Namespace) -> Iterator[Row]:
    """One flow to many unicast hosts, all of it by the kernel in the end."""
    hosts = [f"10.1.{4 + n // 250}.{n % 250 + 1}" for n in range(options.outputs)]
    with Lab() as lab:
        star = lab.star()
        star.sink.ip(*(f"addr add {host}/32 dev k0" for host in hosts))
        star.relay.ip("route add 10.1.0.0/16 dev out0")
        config = rule("wide", f"in0:{GROUP}:5000", *(f"out0:{host}:6000" for host in hosts))
        with Sender(star.source) as sender, Relay(star.relay, config) as relay:

            def carried() -> bool:
                sender.send(GROUP, 5000, [b"x" * SIZE])
                return all(flow["engine"] == "ebpf" for flow in relay.flows()) and bool(relay.flows())

            eventually(carried, "the kernel carries the flow", 60)
            with Capture(star.sink, "k0") as wire:
                sent = payloads(20, SIZE)
                sender.send(GROUP, 5000, sent)
                got = wire.wait(len(sent) * len(hosts))
    each = {host: [p.payload for p in got if p.destination == host] for host in hosts}
    whole = sum(payload == sent for payload in each.values())
    good = all(packet.header_good and packet.checksum_good for packet in got)
    figures = f"{whole:,} of {len(hosts):,} hosts got all {len(sent)}, in order"
    yield f"one flow to {len(hosts):,} unicast outputs", figures, "all", whole == len(hosts) and good


if __name__ == "__main__":
    sys.exit(main())
