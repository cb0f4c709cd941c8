"""Merged frames: UDP GRO forwarding in and UDP_SEGMENT out, against a packet at a time. See README.md.

Builds namespaces, loads a small relay in them, and looks at what comes out. Needs root and two cores.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # the load, and the sink that counts

import gro_spacing
from gro_lab import GROUP, LOAD_CORE, OUT_PORT, POLL, RELAY_CORE, SOURCE, Lab, Load, flows
from gro_look import Receiver, Tap, is_whole, sending
from gro_rate import SPLIT, Case, Rates, both, measure_all
from gro_relay import Relay

from experiment import Experiment
from mrelay.demo.kernel_route import KernelRoute
from traffic import Programs

HELD: Final = 8  # MAX_GRO_SKBS, net/core/gro.c: flows of one hash bucket; frames without receive hash share one
BASE: Final = Case()
BARE: Final = Case(offload="no offload")
UNCHECKED: Final = Case(checked=False)
IN_TURN: Final = Case(flows=HELD)
TOO_MANY: Final = Case(flows=2 * HELD)
IN_A_ROW: Final = Case(flows=64, run=8)
KERNEL_FRAMES: Final = 50  # merged, of POLL datagrams each
MTU: Final = 1500
Part = Callable[[Experiment, Lab], str]  # returns its figures for the verdict
_IN_TIME: Final = 5.0  # seconds
_SETTLED: Final = 0.5  # seconds that what is on its way may still take


def main() -> None:
    """Measure, claim, say. Without a premise only the part is run that shows it best."""
    parts: dict[Part, tuple[str, ...]] = {
        claim_costs: ("merging", "checksum"),
        claim_kernel_routing: ("df",),
        claim_receivers: ("segment",),
        claim_spacing: (),
    }
    experiment = Experiment("poc_gro_gso", __doc__, premises=[name for names in parts.values() for name in names])
    experiment.need_root()
    if not {LOAD_CORE, RELAY_CORE} <= os.sched_getaffinity(0):
        experiment.lacks(f"the two cores {LOAD_CORE} and {RELAY_CORE}")
    os.sched_setaffinity(0, {RELAY_CORE})
    with Lab(most_outputs(experiment)) as lab:
        check_host(experiment, lab)
        said = [part(experiment, lab) for part, premises in parts.items() if experiment.runs(*premises)]
    experiment.finish("; ".join(filter(None, said)))


def check_host(experiment: Experiment, lab: Lab) -> None:
    """End here when the kernel has no XDP live frames, no tcx, or no UDP GRO forwarding."""
    try:
        lab.merge(on=True)
        lab.offload(segmentation=False)
        with Programs(BASE.payload) as sink, lab.sink.inside():
            sink.attach(lab.sink_indexes())
        with Load(lab, flows(1), BASE.payload, 1e6) as load:
            load.send(POLL)
    except (OSError, RuntimeError) as error:
        experiment.lacks(f"Linux 6.6 with XDP live frames, tcx and UDP GRO forwarding ({error})")


# ---- cost ---------------------------------------------------------------------------------------


def most_outputs(experiment: Experiment) -> int:
    return 4 if experiment.short else 8


def claim_costs(experiment: Experiment, lab: Lab) -> str:
    """What a datagram costs, in all cases."""
    wide = Case(outputs=most_outputs(experiment))
    rates = measure_rates(experiment, lab, wide)
    claim_rates(experiment, rates, wide)
    claim_flows(experiment, rates)
    return (
        f"CPU of a datagram against a packet at a time: 1/{rates.gain(BASE):.0f}, {wide.outputs} outputs "
        f"1/{rates.gain(wide):.0f}, no egress offload 1/{rates.gain(BARE):.1f}, {HELD} flows in turn "
        f"1/{rates.gain(IN_TURN):.1f}, {2 * HELD} flows 1/{rates.gain(TOO_MANY):.1f}"
    )


def measure_rates(experiment: Experiment, lab: Lab, wide: Case) -> Rates:
    """All cases, or those that the claims need."""
    cases = [wide, BARE, IN_TURN, TOO_MANY, IN_A_ROW]
    if not experiment.short:
        cases += [Case(payload=size) for size in (100, 500, 1400)]
        cases += [Case(outputs=4), Case(outputs=8, offload=BARE.offload), Case(offload="no UDP segm.")]
        cases += [Case(flows=2), Case(flows=4), Case(flows=64)]
    ways = [*both([BASE]), (BASE, SPLIT), *both([*cases, UNCHECKED])]
    rounds = 2 if experiment.short else 3
    rates = measure_all(
        lab, ways, rounds, merging=experiment.broken != "merging", checked=experiment.broken != "checksum"
    )
    rates.show(experiment)
    return rates


def claim_rates(experiment: Experiment, rates: Rates, wide: Case) -> None:
    """One flow: what merging saves."""
    one_flow = [c for c in rates.cases if c.flows == 1 and c.offload == "all" and c.checked]
    least = min(one_flow, key=rates.gain)
    experiment.claim(
        "one flow: GRO in and UDP_SEGMENT out take under a quarter of a packet at a time's CPU",
        rates.gain(least) > 4,
        f"least: 1/{rates.gain(least):.1f} ({least}), {wide.outputs} outputs: 1/{rates.gain(wide):.1f}",
    )
    bare = min((c for c in rates.cases if c.offload != "all"), key=rates.gain)
    experiment.claim(
        "where egress has no offload at all, under half: the kernel cuts up and sums after one walk down",
        rates.gain(bare) > 2,
        f"least: 1/{rates.gain(bare):.1f} ({bare})",
    )
    experiment.claim(
        "merging alone does not pay: the same merged frames sent datagram by datagram gain under 2.5 times",
        rates.merged(BASE, SPLIT) > 8 and rates.gain(BASE, SPLIT) < 2.5,
        f"{rates.merged(BASE, SPLIT):.0f} datagrams a frame, {rates.gain(BASE, SPLIT):.1f} times",
    )
    experiment.claim(
        "without a UDP checksum nothing merges",
        rates.merged(UNCHECKED) == 1 < rates.merged(BASE),
        f"{rates.merged(UNCHECKED):.1f} datagrams a frame, with one {rates.merged(BASE):.1f}",
    )
    exact = rates.exact()
    experiment.claim(
        "exactly what the relay read comes out on every output, by the kernel's count of segments and by bytes",
        all(exact),
        f"{sum(exact)} of {len(exact)} measurements",
    )


def claim_flows(experiment: Experiment, rates: Rates) -> None:
    """Several flows at once: where merging ends."""
    merged = {c.flows: rates.merged(c) for c in rates.cases if c.run == 1 and c.flows in range(2, HELD + 1)}
    experiment.claim(
        f"up to {HELD} flows in turn share a poll's {POLL} frames, and under half the cost remains",
        all(abs(size * n / POLL - 1) < 0.25 for n, size in merged.items()) and rates.gain(IN_TURN) > 2,
        f"datagrams a frame by flows: {', '.join(f'{n}: {size:.1f}' for n, size in sorted(merged.items()))}; "
        f"1/{rates.gain(IN_TURN):.1f} with {HELD}",
    )
    experiment.claim(
        f"{2 * HELD} flows in turn merge no more (each pushes out the oldest of {HELD}): nothing gained",
        rates.merged(TOO_MANY) < 1.2 and rates.gain(TOO_MANY) < 1.6,
        f"{rates.merged(TOO_MANY):.1f} datagrams a frame, 1/{rates.gain(TOO_MANY):.1f}",
    )
    experiment.claim(
        "what matters is what comes in a row, not how many flows there are",
        rates.merged(IN_A_ROW) > 6 and rates.gain(IN_A_ROW) > 2,
        f"{IN_A_ROW}: {rates.merged(IN_A_ROW):.1f} datagrams a frame, 1/{rates.gain(IN_A_ROW):.1f}",
    )


# ---- kernel multicast routing -------------------------------------------------------------------


def claim_kernel_routing(experiment: Experiment, lab: Lab) -> str:
    """The same stream through the kernel's multicast forwarding cache."""
    with_df = experiment.broken != "df"
    got = {
        (merge, df): _route(lab, merge=merge, df=df and with_df) for merge in (False, True) for df in (True, False)
    }
    all_of_them = KERNEL_FRAMES * POLL
    experiment.table(
        f"Kernel multicast routing, {all_of_them} datagrams",
        ["", "forwarded", "FragFails"],
        [[f"{'GRO' if m else 'plain'}, {'DF' if d else 'no DF'}", *figures] for (m, d), figures in got.items()],
    )
    experiment.claim(
        "kernel multicast routing drops every merged frame with DF (longer than the MTU: it forgets gso_size)",
        got[True, True] == (0, KERNEL_FRAMES),
        f"{got[True, True][0]} of {all_of_them} datagrams, {got[True, True][1]} FragFails",
    )
    experiment.claim(
        "it forwards single datagrams, and merged frames without DF",
        all(got[key] == (all_of_them, 0) for key in got if key != (True, True)),
        f"{', '.join(str(got[key][0]) for key in got if key != (True, True))} of {all_of_them}",
    )
    return "kernel routing: no merged frame with DF"


def _route(lab: Lab, *, merge: bool, df: bool) -> tuple[int, int]:
    """Datagrams that came out, and what was counted as too long to forward unfragmented."""
    lab.merge(on=merge)
    lab.offload()
    with lab.relay.inside():
        route = KernelRoute(SOURCE, GROUP, "r0", ["r1"])
    sink = Programs(BASE.payload)
    with lab.sink.inside():
        sink.attach(lab.sink_indexes())
    before = _frag_fails(lab)
    end = time.monotonic() + _SETTLED
    with route, sink, Load(lab, flows(1), BASE.payload, 1e5, df=df) as load:
        load.send(KERNEL_FRAMES * POLL)
        while True:
            out, fails = sink.datagrams()[0], _frag_fails(lab) - before
            if out + fails * POLL >= KERNEL_FRAMES * POLL or time.monotonic() > end:
                return out, fails


def _frag_fails(lab: Lab) -> int:
    """IpFragFails of nstat, in the relay's namespace."""
    with lab.relay.inside():
        lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Ip:"))
    return int(values[names.index("FragFails")])


# ---- what receivers see -------------------------------------------------------------------------


def claim_receivers(experiment: Experiment, lab: Lab) -> str:
    """Bursts of datagrams of several sizes, once with offload at egress and once without."""
    sent = _bursts()
    lab.merge(on=True)
    how = "forget" if experiment.broken == "segment" else "segment"
    lab.offload()
    good, frames = _receive(lab, sent, how)
    experiment.claim(
        "an application gets what was sent: each datagram by itself, same bytes, same order, on every output",
        good,
        f"{sum(map(len, sent))} datagrams of 1 to 1400 bytes in {len(sent)} bursts, two outputs",
    )
    experiment.claim(
        "a capture on a link that takes merged frames (veth here) shows those, longer than the MTU",
        len(frames) == len(sent) and max(map(len, frames)) > MTU,
        f"{len(frames)} frames, longest {max(map(len, frames))} bytes",
    )
    lab.offload(segmentation=False, generic=False, checksums=False)
    good, frames = _receive(lab, sent, how)
    whole = sum(is_whole(frame) and len(frame) <= MTU for frame in frames)
    experiment.claim(
        "without offload the wire has one frame for each datagram, none fragmented, all checksums right",
        good and whole == len(frames) == sum(map(len, sent)),
        f"{whole} of {len(frames)} frames",
    )
    return ""


def _bursts() -> list[list[bytes]]:
    """Random bytes; a burst is of one size, but for a shorter last one."""
    chance = random.Random(9)
    sizes = [(40, 1000, 300), (POLL - 1, 100, 1), (30, 1400, 1399), (20, 500, 20), (2, 64, 63)]
    return [
        [chance.randbytes(size) for _ in range(count)] + [chance.randbytes(last)] for count, size, last in sizes
    ]


def _receive(lab: Lab, bursts: list[list[bytes]], how: str) -> tuple[bool, list[bytes]]:
    """Whether two applications got just that, and the frames on the way to the first."""
    sent = [datagram for burst in bursts for datagram in burst]
    with (
        Relay(lab, flows(1), 2, how) as relay,
        Receiver(lab, 1) as first,
        Receiver(lab, 2) as second,
        Tap(lab.sink, "d1") as tap,
    ):
        for _ in sending(lab, bursts):
            relay.run(lambda: True)
        end = time.monotonic() + _IN_TIME
        relay.run(lambda: relay.datagrams >= len(sent) or time.monotonic() > end)
        good = first.take(len(sent)) == sent and second.take(len(sent)) == sent
        return good, [seen.packet for seen in tap.udp(OUT_PORT)]


# ---- spacing ------------------------------------------------------------------------------------


def claim_spacing(experiment: Experiment, lab: Lab) -> str:
    """An evenly paced stream through the relay."""
    count = 400 if experiment.short else 1000
    lab.merge(on=True)
    at_once = gro_spacing.measure(lab, count)
    gro_spacing.hold(lab, gro_spacing.HOLD)
    held = gro_spacing.measure(lab, count)
    gro_spacing.hold(lab, 0)
    rows = [("in", at_once.gaps_in), ("out", at_once.gaps_out), ("out, GRO may wait 1 ms", held.gaps_out)]
    experiment.table(
        f"Share of gaps between datagrams, sent {gro_spacing.GAP / 1000:.0f} µs apart",
        ["", *gro_spacing.BINS],
        [[name, *(f"{share:.0%}" for share in gro_spacing.histogram(gaps))] for name, gaps in rows],
    )
    came, gap = (statistics.median(gaps or [0]) for gaps in (at_once.gaps_in, at_once.gaps_out))
    experiment.claim(
        "datagrams that come one in a poll do not wait for each other: none merges, spacing stays",
        at_once.merged < 1.2 and came / 2 < gap < came * 2,
        f"{at_once.merged:.1f} a frame; medians: gap {gap / 1000:.0f} µs, under way {at_once.delay / 1000:.0f} µs",
    )
    gap = statistics.median(held.gaps_out or [0])
    experiment.claim(
        "what merges leaves as a burst: with frames held back for 1 ms, most gaps vanish into few long ones",
        held.merged > 5 and gap < gro_spacing.GAP / 10,
        f"{held.merged:.0f} a frame; medians: gap {gap / 1000:.1f} µs, under way {held.delay / 1000:.0f} µs",
    )
    return f"spacing kept, {held.merged:.0f} at once when GRO waits"


if __name__ == "__main__":
    main()
