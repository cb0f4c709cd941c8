"""What poc_bpf_shared_flow_map claims, each from what it observed on this run.

Owns the order of the runs and the sentences. Blocks for as long as the runs take: seconds.
"""

from contextlib import AbstractContextManager
from typing import Final, NamedTuple

import numpy as np
from flow_map_lab import Lab, Outcome
from flow_map_layout import (
    FAST_TTL,
    FLOW_FAST,
    FLOW_MAP,
    FLOW_WHEN_DRAINED,
    NUMBERED,
    SLOW_TTL,
    TC_ACT_OK,
    differences,
)
from flow_map_relay import BOTH_LOOK_UP, FILTER_DECIDES, TC_DECIDES, Relay, SlowProcess, Way, relaying
from flow_map_wire import PATTERN, SOURCE, Datagram, Receiver, Sender, Taps, bridged, send_tagged, tap

from experiment import Experiment

RATE: Final = 100_000  # datagrams a second
EASY: Final = 50_000  # what the slow path is sure to keep up with, on a busy machine too
CALM: Final = 20_000
OVERLOAD: Final = 300_000  # more than the slow path can take
KEEP: Final = {RATE: 0.0003, EASY: 0.001}  # seconds that a flow stays installed when it goes back and forth
_OVERLOADS: Final = 5  # loads, at most, until one was too much
PATIENCE: Final = 1024  # frames
BATCH: Final = 64  # frames that arrive in one poll of NAPI
AT_ONCE, WHEN_DRAINED = FLOW_FAST, FLOW_WHEN_DRAINED
MAY: Final = {"update", "look up", "delete", "read per-CPU counters", "mmap", "read by read-only fd"}
_COLUMNS: Final = ("installed", "rate", "changes", "lost", "twice", "late", "µs late", "slow")


class Run(NamedTuple):
    """One load: what the slow path did, what arrived, what the programs counted."""

    pps: int
    install_as: int
    report: dict[str, int]
    outcome: Outcome
    counters: dict[str, int]

    def cells(self) -> list[object]:
        """For the tables."""
        outcome, how = self.outcome, {AT_ONCE: "at once", WHEN_DRAINED: "drained"}
        counts = (self.report["changes"], outcome.lost, outcome.doubled, len(outcome.late), outcome.window)
        figures = f"{self.pps // 1000}k", *(f"{n:,.0f}" for n in (*counts, len(outcome.slow)))
        return [how[self.install_as], *figures]


class Claims:
    """All runs, in one lab with one slow path."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.short, self.broken = experiment, experiment.short, experiment.broken
        # What the experiment recommends, unless that premise is taken away.
        self.way = BOTH_LOOK_UP if self.broken == "one-decision" else TC_DECIDES
        self.in_order = AT_ONCE if self.broken == "waiting" else WHEN_DRAINED
        self.patience = None if self.broken == "patience" else PATIENCE

    def run(self) -> str:
        """Everything; the verdict. Without a premise only what shows best that it matters."""
        with Lab() as self.lab, SlowProcess(drop=self.broken != "capabilities") as self.slow:
            if self.broken:
                self.look_for(self.broken)
                return f"without {self.broken}"
            with self.relaying(self.way) as relay:
                self.layouts(relay)
                self.rights()
                ratio = self.latency()
            self.wire()
            self.taps()
            segments = self.merged()
            twice, *_, moved, ordered = self.back_and_forth()
            self.starting_together()
            self.overload()
        wrong = twice.outcome.lost + twice.outcome.doubled
        return (
            f"{moved.report['changes']:,} hand-overs at {moved.pps:,}/s, 0 of {moved.outcome.sent:,} lost or "
            f"doubled (two lookups: {wrong}); {ordered.report['changes']:,} in order; fast path {ratio:.0f}x "
            f"sooner; merged frames of {segments:.0f} pass whole"
        )

    def look_for(self, broken: str) -> None:
        """The claims that fail without this premise."""
        match broken:
            case "capabilities":
                with self.relaying(self.way):
                    self.rights()
            case "one-map":
                self.wire()
            case "patience":
                self.overload()
            case _:
                self.back_and_forth()
                self.starting_together()

    def relaying(self, way: Way) -> AbstractContextManager[Relay]:
        """`way` at work."""
        return relaying(self.lab, way, self.slow, one_map=self.broken != "one-map")

    # ---- the map, and who may write it ----

    def layouts(self, relay: Relay) -> None:
        """C's structs and Python's."""
        wrong = differences(relay.object, FLOW_MAP) + differences(self.lab.numbered, NUMBERED)
        self.experiment.claim(
            "Python's structs have the sizes and offsets that the compiler wrote into the objects' BTF",
            not wrong,
            "; ".join(wrong) or f"{len(FLOW_MAP) + len(NUMBERED)} structs agree",
        )

    def rights(self) -> None:
        """What the slow path's process may do."""
        found = self.slow.ask("rights")
        who = f"uid {found.pop('uid')}, capability sets {' '.join(found.pop('capabilities'))}"
        allowed = {name for name, outcome in found.items() if outcome == "ok"}
        refused = ", ".join(sorted(found.keys() - allowed))
        self.experiment.claim(
            "Descriptors of maps are all that the writer needs; it has no rights, and can do nothing else",
            allowed == MAY and who == f"uid 65534, capability sets {'0' * 16}",
            f"{who}; can: {', '.join(sorted(allowed))}; can't: {refused or '-'}",
        )

    # ---- one by one ----

    def wire(self) -> None:
        """Every datagram's bytes. out1 leaves no checksum and no segmentation to the receiver's side."""
        with (
            self.lab.offload("out1", "tx-checksum-ip-generic", on=False),
            Receiver(self.lab) as receiver,
            self.relaying(self.way) as relay,
        ):
            self.changes_one_by_one(relay, receiver)
            count = 1000 if self.short else 4000
            whole = self.received(receiver, count, AT_ONCE, keep=0.005)
            paths = self.lab.tallies.outcome(count)
            with self.lab.offload("in0", "rx-udp-gro-forwarding", on=True):
                relay.install(relay.key(), FLOW_FAST, 0)
                merged = self.received(receiver, count, None, BATCH)
        self.experiment.claim(
            "What tc rewrote has right checksums, be they whole, partial or a merged frame's when they came",
            not receiver.wrong and whole == merged == count and paths.mixed,
            f"{whole:,} of {count:,} whole ones ({len(paths.fast):,} by tc), {merged:,} of {count:,} merged; "
            f"{receiver.wrong} wrong checksums",
        )

    def changes_one_by_one(self, relay: Relay, receiver: Receiver) -> None:
        """A datagram after each change, which has to go the new way. Its checksum is partial: a local socket's."""
        count, right, key = 60 if self.short else 200, 0, relay.key(source=SOURCE).hex()
        self.slow.ask("policy", install_as=None)
        self.lab.tallies.clear(TC_ACT_OK)
        with Sender(self.lab) as sender:
            for number in range(count):
                if number % 2:
                    self.slow.ask("remove")
                else:
                    self.slow.ask("install", key=key)
                sender.send(number)
                ttl = SLOW_TTL if number % 2 else FAST_TTL
                right += receiver.receive() == Datagram(number, PATTERN, ttl, relay.egress.getsockname())
            more = len(receiver.waiting())
        self.experiment.claim(
            "A change of the map is in force for tc and for the ring when the writer's system call returns; both "
            "paths make the same datagrams",
            right == count and not more,
            f"{count} changes, one datagram after each: {right} went the new way, {more} came besides",
        )

    def received(
        self, receiver: Receiver, count: int, install_as: int | None, batch: int = 1, keep: float | None = None
    ) -> int:
        """How many different ones of `count` datagrams the receiver got."""
        self.slow.ask("policy", install_as=install_as, keep=keep)
        self.lab.tallies.clear(TC_ACT_OK)
        self.lab.load.run(count, CALM if batch == 1 else RATE, batch=batch)
        self.slow.ask("report")
        return len({datagram.number for datagram in receiver.waiting()})

    def taps(self) -> None:
        """Which packet sockets see what: tc is between ETH_P_ALL and ETH_P_IP."""
        rows: list[tuple[str, list[list[int]]]] = []
        with Sender(self.lab) as sender, Taps(self.lab) as taps:
            sender.send(0)
            rows.append(("plain", taps.see()))
            send_tagged(self.lab)
            rows.append(("VLAN tag", taps.see()))
            sender.send(0, more=4000)
            rows.append(("fragments", taps.see()))
            with bridged(self.lab) as is_port:
                if is_port:
                    sender.send(0)
                    rows.append(("bridge's port", taps.see()))
        self.experiment.table("Frames seen (bytes)", ("", *taps.names), [(name, *seen) for name, seen in rows])
        whole = [142], [142], [142]
        want = [list(whole), list(whole), [[1514, 1514, 1182], [1514, 1514, 1182], [4142]], [[142], [], []]]
        self.experiment.claim(
            "A ring bound to ETH_P_IP, which tc comes before, sees what one bound to ETH_P_ALL sees, fragments "
            "put together too; but nothing on a bridge's port",
            [seen for _, seen in rows] == want[: len(rows)],
            "see the table" + ("" if len(rows) == len(want) else "; no bridges in this kernel"),
        )

    # ---- the hand-over ----

    def load(
        self,
        way: Way,
        install_as: int,
        seconds: float,
        *,
        flows: int = 1,
        pps: int = RATE,
        keep: float | None = None,
    ) -> Run:
        """Numbered datagrams through `way`, while the slow path installs flows at their first datagram."""
        with self.relaying(way) as relay:
            self.slow.ask("policy", install_as=install_as, keep=keep, patience=self.patience)
            self.lab.tallies.clear()
            sent = self.lab.load.run(int(pps * seconds), pps, flows)
            report = self.slow.ask("report")
            return Run(pps, install_as, report, self.lab.tallies.outcome(sent, flows), relay.counters())

    def back_and_forth(self) -> list[Run]:
        """One flow, installed and removed some thousand times a second."""
        seconds = 0.4 if self.short else 1.0
        ways = [(way, AT_ONCE, RATE) for way in (BOTH_LOOK_UP, FILTER_DECIDES, self.way)]
        ways.append((self.way, self.in_order, EASY))
        with tap(self.lab):  # another packet socket, as tcpdump opens
            runs = [self.load(way, how, seconds, pps=pps, keep=KEEP[pps]) for way, how, pps in ways]
        rows = [(way.name, *run.cells()) for (way, _, _), run in zip(ways, runs, strict=True)]
        self.experiment.table("One flow handed over and back", ("decides", *_COLUMNS), rows)
        twice, marked, at_once, in_order = runs
        late = at_once.outcome.late
        self.experiment.claim(
            "If filter and tc each look a flow up, datagrams between the two are doubled by installing it and "
            "lost by removing it",
            twice.outcome.doubled + twice.outcome.lost > 0,
            f"{twice.report['changes']:,} changes: {twice.outcome.doubled} doubled, {twice.outcome.lost} lost",
        )
        self.exactly_once("With one decision a datagram, back and forth loses and doubles nothing", runs[1:])
        self.experiment.claim(
            "The filter's verdict reaches tc in the packet, with another packet socket open too",
            not marked.counters["unmarked"] and marked.counters["frames"] > 0,
            f"{marked.counters['frames']:,} forwarded by it, {marked.counters['unmarked']} without one",
        )
        self.experiment.claim(
            "A flow that is installed at once overtakes its own datagrams",
            len(late) > 0,
            f"{len(late):,} of {at_once.outcome.sent:,} late, by up to {at_once.outcome.window:,.0f} µs",
        )
        self.never_late("Installed once the slow path has sent all it had, no flow overtakes itself", [in_order])
        return runs

    def starting_together(self) -> None:
        """Flows that start at the same moment."""
        counts, seconds = ((1, 1000), 0.1) if self.short else ((1, 32, 1000), 0.25)
        kinds = [(flows, install_as) for flows in counts for install_as in (AT_ONCE, self.in_order)]
        runs = [self.load(self.way, install_as, seconds, flows=flows) for flows, install_as in kinds]
        rows = [(flows, *run.cells()) for (flows, _), run in zip(kinds, runs, strict=True)]
        self.experiment.table("Flows starting at the same moment", ("flows", *_COLUMNS), rows)
        self.exactly_once("Flows that start together lose and double nothing, the first datagram included", runs)
        self.never_late("Nor is any of theirs late when they wait for the slow path", runs[1::2])

    def overload(self) -> None:
        """A flow that the slow path can't keep up with, so that it never has sent on all.

        Others may take the load's core for a moment, in which the slow path does keep up; then once more.
        """
        runs: list[Run] = []
        while len(runs) < _OVERLOADS and all(run.outcome.mixed and not run.report["forced"] for run in runs):
            runs.append(self.load(self.way, self.in_order, 0.3, pps=OVERLOAD))
        self.experiment.table("One flow, too fast", ("", *_COLUMNS), [("", *run.cells()) for run in runs])
        self.exactly_once(
            f"A flow faster than the slow path is installed after {PATIENCE:,} datagrams; none is lost or doubled",
            runs,
        )

    def exactly_once(self, text: str, runs: list[Run]) -> None:
        """A claim about all of `runs`, each of which has to have used both paths."""
        lost, doubled = sum(run.outcome.lost for run in runs), sum(run.outcome.doubled for run in runs)
        sent, changes = sum(run.outcome.sent for run in runs), sum(run.report["changes"] for run in runs)
        full = sum(run.report["lost"] for run in runs)
        mixed = all(run.outcome.mixed for run in runs)
        self.experiment.claim(
            text,
            mixed and not lost and not doubled,
            f"{sent:,} datagrams, {changes:,} changes: {lost} lost ({full} by a full ring), {doubled} doubled"
            + ("" if mixed else "; a run that used one path only"),
        )

    def never_late(self, text: str, runs: list[Run]) -> None:
        """A claim about those of `runs` in which the slow path kept up."""
        kept_up = [run for run in runs if run.outcome.mixed and not run.report["forced"]]
        late, sent = sum(len(run.outcome.late) for run in kept_up), sum(run.outcome.sent for run in kept_up)
        observed = f"{late} of {sent:,} late; the slow path kept up in {len(kept_up)} of {len(runs)} runs"
        self.experiment.claim(text, bool(kept_up) and not late, observed)

    # ---- figures ----

    def latency(self) -> float:
        """How much sooner a datagram arrives by the fast path, medians."""
        delays: dict[str, list[float]] = {"slow": [], "fast": []}
        for _ in range(2 if self.short else 4):
            for path, install_as in (("slow", None), ("fast", AT_ONCE)):
                self.slow.ask("policy", install_as=install_as)
                self.lab.tallies.clear()
                sent = self.lab.load.run(2000, CALM)
                self.slow.ask("report")
                found = getattr(self.lab.tallies.outcome(sent), path)
                delays[path] += [float(np.percentile(found, p)) / 1000 for p in (50, 99)] if len(found) else [0, 0]
        rows = [(path, *(f"{np.median(values[i::2]):.1f}" for i in (0, 1))) for path, values in delays.items()]
        self.experiment.table(f"Delay at {CALM:,}/s, µs", ("path", "p50", "p99"), rows)
        slow, fast = (float(np.median(delays[path][::2])) for path in ("slow", "fast"))
        holds = 0 < 2 * fast < slow
        self.experiment.claim(
            "The fast path takes less than half of the slow path's time",
            holds,
            f"median {fast:.1f} µs and {slow:.1f} µs",
        )
        return slow / fast if fast else 0.0

    def merged(self) -> float:
        """Frames that GRO merged, to two outputs; datagrams a frame."""
        count = 20_000 if self.short else 60_000
        with (
            self.relaying(self.way) as relay,
            self.lab.offload("in0", "rx-udp-gro-forwarding", on=True),
        ):
            self.slow.ask("policy", install_as=None)
            relay.install(relay.key(), FLOW_FAST, 1)
            self.lab.tallies.clear()
            sent = self.lab.load.run(count, OVERLOAD, batch=BATCH)
            counters, frames = relay.counters(), [self.lab.tallies.frames(output) for output in (0, 1)]
        outcomes = [self.lab.tallies.outcome(sent, output=output) for output in (0, 1)]
        bad = sum(outcome.lost + outcome.doubled + len(outcome.late) for outcome in outcomes)
        size = counters["datagrams"] / max(1, counters["frames"])
        self.experiment.claim(
            "tc sees merged frames (gso_segs) and forwards them whole, to two outputs: bpf_clone_redirect and "
            "bpf_redirect",
            not bad and size > 4 and all(frame * 4 < datagrams == sent for frame, datagrams in frames),
            f"{counters['datagrams']:,} datagrams in {counters['frames']:,} frames in; (frames, datagrams) out "
            f"{frames[0]}, {frames[1]}; {bad} lost, doubled or late",
        )
        return size
