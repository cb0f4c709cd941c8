"""The counters for Prometheus. Owns the metrics' names; called by api, in a thread. Nothing here blocks."""

from collections.abc import Iterable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mrelay.protocols.alarms import KINDS

Table = dict[str, Any]


class _Collector(Collector):
    """Metrics from the objects that /v1/stats, /v1/workers, /v1/rules and /v1/streams give."""

    def __init__(self, stats: Table, workers: Table, rules: Table, streams: Table) -> None:
        self._stats, self._workers, self._rules, self._streams = stats, workers, rules, streams

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield CounterMetricFamily(
            "mrelay_received_datagrams", "Datagrams to an address that a rule names.", value=stats["received"]
        )
        yield CounterMetricFamily(
            "mrelay_matched_datagrams", "Datagrams that at least one rule took.", value=stats["matched"]
        )
        dropped = CounterMetricFamily(
            "mrelay_dropped_datagrams", "Datagrams received and not matched, by reason.", labels=["reason"]
        )
        for reason, count in stats["drops"].items():
            dropped.add_metric([reason], count)
        yield dropped
        yield from self._by_engine()
        yield from self._by_rule()
        yield from self._by_output()
        yield GaugeMetricFamily("mrelay_flows", "Flows in the workers' tables.", value=stats["flows"])
        restarts = CounterMetricFamily("mrelay_worker_restarts", "Restarts of a worker.", labels=["worker"])
        for worker in self._workers["workers"]:
            restarts.add_metric([str(worker["worker"])], worker["restarts"])
        yield restarts
        repairs = CounterMetricFamily(
            "mrelay_worker_repairs", "Times that a worker had other rules than it was told.", labels=["worker"]
        )
        for worker in self._workers["workers"]:
            repairs.add_metric([str(worker["worker"])], worker["repairs"])
        yield repairs
        yield from self._by_stream()

    def _by_engine(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "mrelay_carried_datagrams",
            "Datagrams, of those matched, that the kernel's fast path carried.",
            value=self._stats["carried"],
        )
        passed = CounterMetricFamily(
            "mrelay_slow_path_frames",
            "Frames, of all traffic on its interfaces, that the fast path left to others, by reason.",
            labels=["reason"],
        )
        for reason, count in self._stats["passed"].items():
            passed.add_metric([reason], count)
        flows = GaugeMetricFamily("mrelay_engine_flows", "Flows by what carries them.", labels=["engine"])
        for engine, count in self._stats["engines"].items():
            flows.add_metric([engine], count)
        yield from (passed, flows)

    def _by_rule(self) -> Iterator[Metric]:
        packets = CounterMetricFamily("mrelay_rule_packets", "Datagrams that a rule took.", labels=["rule"])
        octets = CounterMetricFamily("mrelay_rule_bytes", "Payload bytes that a rule took.", labels=["rule"])
        for rule in self._stats["rules"]:
            packets.add_metric([rule["name"]], rule["packets"])
            octets.add_metric([rule["name"]], rule["bytes"])
        up = GaugeMetricFamily("mrelay_rule_up", "1 when all of a rule is up.", labels=["rule"])
        for rule in self._rules["rules"]:
            up.add_metric([rule["name"]], rule["state"] == "up")
        yield from (packets, octets, up)

    def _by_output(self) -> Iterator[Metric]:
        families = {
            "packets": "Datagrams that an output handed to the kernel.",
            "bytes": "Payload bytes that an output handed to the kernel.",
            "errors": "Datagrams that the kernel refused from an output.",
        }
        for key, text in families.items():
            family = CounterMetricFamily(f"mrelay_output_{key}", text, labels=["rule", "output"])
            for rule in self._stats["rules"]:
                for output in rule["outputs"]:
                    family.add_metric([rule["name"], output["to"]], output[key])
            yield family

    def _by_stream(self) -> Iterator[Metric]:
        """Of the streams of rules that ask for health. What a format can't tell has no sample."""
        for name, key, text in _STREAM_COUNTERS:
            counter = CounterMetricFamily(f"mrelay_stream_{name}", text, labels=_STREAM_LABELS)
            for stream in self._streams["streams"]:
                if stream[key] is not None:
                    counter.add_metric(_stream_labels(stream), stream[key])
            yield counter
        for name, key, text in _STREAM_GAUGES:
            gauge = GaugeMetricFamily(f"mrelay_stream_{name}", text, labels=_STREAM_LABELS)
            for stream in self._streams["streams"]:
                if stream[key] is not None:
                    gauge.add_metric(_stream_labels(stream), stream[key])
            yield gauge
        alarms = GaugeMetricFamily(
            "mrelay_stream_alarm", "1 while it is raised.", labels=[*_STREAM_LABELS, "alarm"]
        )
        for stream in self._streams["streams"]:
            for kind in KINDS:
                alarms.add_metric([*_stream_labels(stream), kind], kind in stream["alarms"])
        yield alarms


_STREAM_LABELS: Final = ("rule", "interface", "vlan", "source", "group", "port")
_STREAM_COUNTERS: Final = (
    ("units", "units", "What the stream numbers (datagrams, messages, transport packets), without duplicates."),
    ("lost_units", "lost", "Of these, those that did not come."),
    ("reordered_units", "reordered", "Those that came after one with a higher number."),
    ("duplicate_units", "duplicates", "Those that came again."),
    ("missed", "missed", "Times that the relay could not hear all of it; what is missing there is not lost."),
)
_STREAM_GAUGES: Final = (
    ("loss_ratio", "loss", "Lost of all, over the last ten seconds."),
    ("jitter_seconds", "jitter", "Interarrival jitter (RFC 3550)."),
    ("silence_seconds", "silence", "Since the last datagram."),
)


def _stream_labels(stream: Table) -> list[str]:
    return ["" if stream[label] is None else str(stream[label]) for label in _STREAM_LABELS]


def exposition(stats: Table, workers: Table, rules: Table, streams: Table) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(_Collector(stats, workers, rules, streams))
    return generate_latest(registry)
