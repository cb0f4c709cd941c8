"""What the demo found: the numbers, whether they add up, and how they are said.

Pure. Called by the demo command at the end, and for each line it shows meanwhile.
"""

from dataclasses import dataclass
from typing import Any

from mrelay.demo.stream import Reading
from mrelay.demo.topology import RP_FILTER, SOURCE


@dataclass(frozen=True)
class KernelReport:
    """The same stream with kernel multicast routing in place of the relay."""

    sent: int
    receivers: list[Reading]
    reverse_path_drops: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "sent": self.sent,
            "received": [reading.received for reading in self.receivers],
            "reverse_path_drops": self.reverse_path_drops,
            "rp_filter": RP_FILTER,
        }

    def lines(self) -> list[str]:
        """What happened, and why."""
        received = ", ".join(f"{r.name} received {r.received:,} of {self.sent:,}" for r in self.receivers)
        return [
            f"kernel multicast routing, same host, same stream: {received}",
            f"  it has no route back to {SOURCE}: the reverse-path check (rp_filter={RP_FILTER}) dropped "
            f"{self.reverse_path_drops:,}",
        ]


@dataclass(frozen=True)
class Report:
    """The stream through the relay; `stats` is what the relay counted (GET /v1/stats)."""

    sent: int
    receivers: list[Reading]
    stats: dict[str, Any]
    kernel: KernelReport | None

    def lost(self, reading: Reading) -> int:
        """Of all that were sent, those that didn't arrive (the receiver can't see the last ones missing)."""
        return self.sent - (reading.received - reading.duplicates)

    @property
    def counters_add_up(self) -> bool:
        """The relay saw every datagram, put each in one counter, and sent what the receivers got."""
        packets = [output["packets"] for rule in self.stats["rules"] for output in rule["outputs"]]
        return self.stats["received"] == self.sent == self.stats["matched"] + sum(
            self.stats["drops"].values()
        ) and packets == [reading.received for reading in self.receivers]

    @property
    def ok(self) -> bool:
        """Nothing was lost and the counters add up."""
        nothing_lost = all(self.lost(reading) == 0 for reading in self.receivers)
        return self.sent > 0 and nothing_lost and self.counters_add_up

    def to_json(self) -> dict[str, Any]:
        """As plain values; latencies in µs."""
        return {
            "ok": self.ok,
            "sent": self.sent,
            "receivers": [
                {
                    "name": reading.name,
                    "group": reading.group,
                    "received": reading.received,
                    "lost": self.lost(reading),
                    "reordered": reading.reordered,
                    "duplicates": reading.duplicates,
                    "latency_us": reading.latency,
                }
                for reading in self.receivers
            ],
            "relay": self.stats,
            "counters_add_up": self.counters_add_up,
            "kernel": self.kernel.to_json() if self.kernel else None,
        }

    def lines(self) -> list[str]:
        """The last lines that the demo prints."""
        lines = self.kernel.lines() if self.kernel else []
        lines.append(f"mrelay: {self.sent:,} datagrams from {SOURCE}")
        lines += [
            f"  {reading.name} ({reading.group}): received {reading.received:,}, "
            f"lost {self.lost(reading):,}, latency {latency_text(reading)}"
            for reading in self.receivers
        ]
        right = "adds up" if self.counters_add_up else "DOES NOT ADD UP with what was sent and received"
        lines.append(f"  received = matched + drops: {balance_text(self.stats)}: {right}")
        return lines


def balance_text(stats: dict[str, Any]) -> str:
    """The relay's balance with its numbers: 100 = 98 + 2 (2 ttl_expired)."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in stats["drops"].items() if count)
    drops = sum(stats["drops"].values())
    balance = f"{stats['received']:,} = {stats['matched']:,} + {drops:,}"
    return f"{balance} ({reasons})" if reasons else balance


def latency_text(reading: Reading) -> str:
    """p50 and p99, or a dash where nothing came."""
    if reading.latency["p50"] is None:
        return "–"
    return f"p50 {reading.latency['p50']:.0f} µs, p99 {reading.latency['p99']:.0f} µs"
