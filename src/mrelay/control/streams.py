"""The health of streams, for the rules that ask for it: measured, judged once a second, shown.

Owns a meter and the alarms of each stream, and the view of /v1/streams; ears brings the frames. `run` is one of
main's tasks. Nothing blocks.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import collapse_addresses, ip_network
from typing import Any, Final

from mrelay.control.ears import LISTEN, Ear, Ears, Hearing
from mrelay.control.events import Alarm, EventLog, Flow
from mrelay.control.links import LinkTable
from mrelay.control.reconcile import Reconciler
from mrelay.control.rulebook import Rulebook
from mrelay.control.supervisor import Supervisor
from mrelay.control.tap import Frame
from mrelay.messages import PutRule
from mrelay.model.endpoint import Network
from mrelay.model.health import Health
from mrelay.model.rule import Rule
from mrelay.model.ruleset import FlowKey, RuleSet, address_text
from mrelay.protocols.alarms import Alarms, Change, Kind, LossRatio
from mrelay.protocols.frame import datagram, segments, walk
from mrelay.protocols.stream import Meter, meter_for

log = logging.getLogger(__name__)

Table = dict[str, Any]

TICK: Final = 1.0  # seconds
MAX_STREAMS: Final = 4096
MAX_NETWORKS: Final = 64  # of a tap: supervisor.taps
FORGET: Final = 3600.0  # seconds of silence after which a stream is gone for good
UNSURE: Final = 10.0  # seconds for which a stream is said not to be seen whole after something was missed
ALL: Final = (ip_network("224.0.0.0/4"), ip_network("ff00::/8"))
XDP: Final = "XDP takes its frames before they can be heard: leave the interface out of xdp under [relay]"


@dataclass(slots=True)
class Stream:
    """One flow of a rule that asks for health. Times are monotonic seconds."""

    rule: str
    health: Health
    meter: Meter
    alarms: Alarms
    ratio: LossRatio = field(default_factory=LossRatio)
    packets: int = 0
    bytes: int = 0
    heard: float = 0.0
    unsure: float = -UNSURE  # when something was last missed
    missed: int = 0  # how often
    loss: float | None = None  # over the last ticks


class Streams:
    """All of them. `left_out`: datagrams of flows that there was no room for."""

    def __init__(
        self,
        supervisor: Supervisor,
        book: Rulebook,
        links: LinkTable,
        reconciler: Reconciler,
        events: EventLog,
    ) -> None:
        self._book, self._links, self._reconciler, self._events = book, links, reconciler, events
        self.streams: dict[FlowKey, Stream] = {}
        self.left_out = 0
        self._ears = Ears(supervisor, self._take, self._miss)
        self._others: set[FlowKey] = set()  # flows that no such rule takes
        self._followed: tuple[object, object] = (None, None)
        self._rules = RuleSet()  # those that ask for health
        self._names: dict[int, Rule] = {}  # by slot
        self._quiet: dict[str, tuple[float, Alarms]] = {}  # rules of which no stream was heard yet, and since when

    # ---- which taps ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Listen and judge until cancelled."""
        try:
            while True:
                self._follow()
                await asyncio.sleep(TICK)
                self._ears.check()
                self._judge(time.monotonic())
        finally:
            self._ears.close()

    def _follow(self) -> None:
        """Have the taps that the running rules want."""
        now = (self._book.rules, self._reconciler.running)
        if now[0] is self._followed[0] and now[1] is self._followed[1]:
            return
        self._followed = now
        self._take_rules()
        self._ears.want(self._wanted())

    def _take_rules(self) -> None:
        slots = self._book.slots.rules
        self._names = {slots[rule.name].index: rule for rule in self._book.rules if rule.health}
        self._rules, self._others = RuleSet(), set()
        for rule in self._reconciler.running:
            if rule.rule in self._names:
                self._rules.put(rule)
        self._keep_streams()
        names = [self._names[rule.rule] for rule in self._rules]
        before, now = self._quiet, time.monotonic()
        self._quiet = {
            rule.name: before.get(rule.name, (now, Alarms({"silence": rule.health.silence})))
            for rule in names
            if rule.health
        }

    def _keep_streams(self) -> None:
        """Forget the streams whose rule is gone or measures otherwise now."""
        for key, stream in list(self.streams.items()):
            rule = self._rule_of(key)
            if rule is None or (rule.name, rule.health) != (stream.rule, stream.health):
                self._forget(key)

    def _wanted(self) -> dict[Ear, tuple[str, ...]]:
        found: dict[Ear, list[PutRule]] = defaultdict(list)
        for rule in self._rules:
            health = self._names[rule.rule].health
            if health is not None and not self._has_xdp(rule.ifindex):
                found[Ear(rule.ifindex, health.sample)].append(rule)
        return {
            ear: _networks(self._names[rule.rule].from_.address for rule in rules) for ear, rules in found.items()
        }

    def _has_xdp(self, ifindex: int) -> bool:
        return self._reconciler.xdp_at(ifindex) == ""

    def _rule_of(self, key: FlowKey) -> Rule | None:
        """The first rule that asks for this flow's health."""
        return next((self._names[slot] for slot in self._rules.resolve(key).rules), None)

    # ---- listening -------------------------------------------------------------------------------

    def _miss(self, ear: Ear, count: int) -> None:
        """From here on a gap in a stream may be of our own making; `count` frames 0: we begin to listen."""
        now = time.monotonic()
        for key, stream in self.streams.items():
            if key.ifindex == ear.ifindex and stream.health.sample == ear.sample:
                stream.meter.excuse()
                if count:
                    stream.unsure, stream.missed = now, stream.missed + 1

    def _take(self, ear: Ear, frame: Frame) -> None:
        data = frame.data
        packet = walk(data, frame.network, frame.vlan)
        found = None if packet is None else datagram(data, packet, pieces=True)
        if packet is None or found is None or len(packet.vlans) > 1:
            return
        vlan = packet.vlans[0] if packet.vlans else 0
        key = FlowKey(ear.ifindex, vlan, packet.family, packet.source, packet.destination, found.port)
        stream = self.streams.get(key) or self._new(key)
        if stream is None or stream.health.sample != ear.sample:
            return
        at = frame.time / 1e9
        for start, end in segments(found.start, found.end, frame.segment):
            stream.meter.add(data, start, end, at)
            stream.packets += 1
        stream.bytes += found.length
        stream.heard = time.monotonic()

    def _new(self, key: FlowKey) -> Stream | None:
        if key in self._others:
            return None
        rule = self._rule_of(key)
        if rule is None or rule.health is None:
            if len(self._others) >= MAX_STREAMS:
                self._others.clear()
            self._others.add(key)
            return None
        if len(self.streams) >= MAX_STREAMS:
            self.left_out += 1
            return None
        health = rule.health
        thresholds: Mapping[Kind, float] = {
            "loss": health.loss,
            "jitter": health.jitter,
            "silence": health.silence,
        }
        self.streams[key] = Stream(rule.name, health, meter_for(health), Alarms(thresholds))
        return self.streams[key]

    # ---- judging ---------------------------------------------------------------------------------

    def _judge(self, now: float) -> None:
        self._judge_quiet(now)  # first: that a rule was heard comes before that its stream is silent again
        for key, stream in list(self.streams.items()):
            hearing = self._ears.by_key.get(Ear(key.ifindex, stream.health.sample))
            figures = stream.meter.figures()
            stream.loss = None if figures.lost is None else stream.ratio.tick(figures.units, figures.lost)
            values: dict[Kind, float | None] = {
                "loss": stream.loss,
                "jitter": figures.jitter,
                "silence": _silence(stream, hearing, now),
            }
            self._tell(stream.rule, key, stream.alarms.judge(values, now))
            if now - stream.heard > FORGET:
                self._forget(key)

    def _judge_quiet(self, now: float) -> None:
        heard = {stream.rule for stream in self.streams.values()}
        for name, (since, alarms) in self._quiet.items():
            if not self._deaf(name):
                self._tell(name, None, alarms.judge({"silence": 0.0 if name in heard else now - since}, now))

    def _deaf(self, name: str) -> bool:
        """Whether the rule's taps are not (yet) there, so that silence says nothing."""
        rules = [rule for rule in self._rules if self._names[rule.rule].name == name]
        hearings = [self._ears.by_key.get(Ear(rule.ifindex, _sample(self._names[rule.rule]))) for rule in rules]
        return not all(hearing is not None and not hearing.problem for hearing in hearings)

    def _forget(self, key: FlowKey) -> None:
        stream = self.streams.pop(key)
        cleared = [Change(kind, False, 0.0, 0.0) for kind in stream.alarms.raised]
        self._tell(stream.rule, key, cleared)

    def _tell(self, rule: str, key: FlowKey | None, changes: Iterable[Change]) -> None:
        flow = None if key is None else self._flow(key)
        for change in changes:
            event = Alarm(
                rule=rule,
                name=change.kind,
                flow=flow,
                value=round(change.value, 6),
                threshold=change.threshold,
                raised=change.raised,
            )
            self._events.add(event)
            log.log(logging.WARNING if change.raised else logging.INFO, "%s", event.say())

    # ---- the view --------------------------------------------------------------------------------

    def view(self) -> Table:
        """/v1/streams"""
        now = time.monotonic()
        streams = [self._stream(key, stream, now) for key, stream in self.streams.items()]
        streams.sort(key=lambda one: (one["rule"], one["group"], one["port"], one["source"]))
        return {
            "streams": streams,
            "rules": [self._rule(rule) for rule in self._book.rules if rule.health],
            "left_out": self.left_out,
        }

    def _rule(self, rule: Rule) -> Table:
        ifindexes = {put.ifindex for put in self._rules if self._names[put.rule].name == rule.name}
        problems = {XDP for ifindex in ifindexes if self._has_xdp(ifindex)}
        for ifindex in ifindexes:
            hearing = self._ears.by_key.get(Ear(ifindex, _sample(rule)))
            problems |= {hearing.problem} if hearing is not None and hearing.problem else set()
        return {
            "rule": rule.name,
            "health": str(rule.health),
            "problem": "; ".join(sorted(problems)) if ifindexes else "the rule's input is not up",
            "alarms": list(self._quiet[rule.name][1].raised) if rule.name in self._quiet else [],
        }

    def words(self) -> dict[FlowKey, str]:
        """Each stream's health in a few words."""
        now = time.monotonic()
        return {key: _words(stream, now) for key, stream in self.streams.items()}

    def _stream(self, key: FlowKey, stream: Stream, now: float) -> Table:
        figures = stream.meter.figures()
        seen = "sampled" if stream.health.sample > 1 else "all"
        return {
            "rule": stream.rule,
            **self._flow(key).model_dump(),
            "format": stream.meter.format,
            "seen": "not all" if now - stream.unsure < UNSURE else seen,
            "missed": stream.missed,
            "packets": stream.packets,
            "bytes": stream.bytes,
            "silence": round(now - stream.heard, 1),
            "loss": stream.loss if stream.loss is None else round(stream.loss, 6),
            "jitter": None if figures.jitter is None else round(figures.jitter, 6),
            **{key: getattr(figures, key) for key in _COUNTS},
            "details": figures.details,
            "alarms": list(stream.alarms.raised),
        }

    def _flow(self, key: FlowKey) -> Flow:
        return Flow(
            interface=self._links.name(key.ifindex),
            vlan=key.vlan or None,
            source=address_text(key.family, key.source),
            group=address_text(key.family, key.group),
            port=key.port,
        )


_TROUBLES: Final = {"loss": "loss {0:.2%}", "jitter": "jitter {1:.1f} ms", "silence": "silent for {0:.0f} s"}
_COUNTS: Final = ("units", "lost", "reordered", "duplicates", "restarts", "excused", "bad")


def _words(stream: Stream, now: float) -> str:
    troubles = [_TROUBLES[kind].format(value, 1000 * value) for kind, value in stream.alarms.raised.items()]
    unsure = ", not all seen" if now - stream.unsure < UNSURE else ""
    return f"{stream.meter.format}: {', '.join(troubles) or 'ok'}{unsure}"


def _sample(rule: Rule) -> int:
    return rule.health.sample if rule.health else 1


def _silence(stream: Stream, hearing: Hearing | None, now: float) -> float | None:
    """Seconds without a datagram; None where we did not listen, or not to all."""
    if hearing is None or hearing.problem or now - stream.unsure < TICK * 2:
        return None
    if stream.health.sample == 1:
        return now - stream.heard
    turn = hearing.over - LISTEN
    return now - stream.heard if not hearing.listening and 0 < stream.heard < turn else 0.0


def _networks(addresses: Iterable[Network]) -> tuple[str, ...]:
    """What a tap lets in for these; all groups, besides the hosts, when they are too many."""
    wanted = list(addresses)
    found = [
        *_merged(one for one in wanted if one.version == 4),
        *_merged(one for one in wanted if one.version == 6),
    ]
    if len(found) > MAX_NETWORKS:
        hosts = [one for one in found if not one.is_multicast]
        found = [*ALL, *hosts[: MAX_NETWORKS - len(ALL)]]
    return tuple(map(str, found))


def _merged(networks: Iterable[Any]) -> list[Network]:
    """The same addresses in as few networks as can be; all of one family."""
    return list(collapse_addresses(networks))
