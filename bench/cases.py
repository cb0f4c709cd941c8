"""What is measured: kinds of load (`Case`), gathered into sections, and how long each takes. Pure.

Owns the list of sections, which are the parts of the report. plan.py asks which peers take part; measure.py
carries out. Rates are datagrams a second.
"""

import ipaddress
from dataclasses import dataclass
from typing import Final, Literal

import lab as labs
from traffic import Flow

PORT: Final = 5000  # of every flow at ingress
OUT_GROUP, OUT_PORT = "239.2.2.2", 6000  # where a relay that rewrites sends a single flow
LATENCY_RATES: Final = (1_000, 20_000, 100_000)
Measure = Literal["load", "latency", "spacing", "changes"]
Sender = Literal["xdp", "udp", "udp-merged"]


@dataclass(frozen=True)
class Case:
    """One kind of load and set-up.

    merge: UDP GRO may be on at ingress; if not, GRO is off. df: senders set Don't Fragment.
    segment: egress has segmentation offload.
    busy: so many of the flows, the first, have traffic while it is measured, the others had before; 0: all.
    rules: as many, of which one sees traffic. hosts: so many unicast hosts behind one output instead of a group.
    """

    flows: int = 1
    busy: int = 0
    outputs: int = 1
    payload: int = 1000
    merge: bool = True
    df: bool = True
    segment: bool = True
    rules: int = 1
    hosts: int = 0
    workers: int = 1
    sender: Sender = "xdp"

    def __str__(self) -> str:
        to = _count(self.hosts, "unicast host") if self.hosts else _count(self.outputs, "output")
        special = {
            f"{self.busy:,} of them busy": self.busy > 0,
            "GRO off": not self.merge,
            "senders without DF": not self.df,
            "no segmentation offload": not self.segment,
            _count(self.rules, "rule"): self.rules > 1,
            _count(self.workers, "worker"): self.workers > 1,
            "from a socket": self.sender == "udp",
            "from a socket with UDP_SEGMENT": self.sender == "udp-merged",
        }
        words = [
            _count(self.flows, "flow"),
            to,
            f"{self.payload} B",
            *(what for what, is_so in special.items() if is_so),
        ]
        return ", ".join(words)

    @property
    def copies(self) -> int:
        """Datagrams out for one in."""
        return self.hosts or self.outputs

    def traffic(self) -> list[Flow]:
        """All flows: what the source sends, in turn, unless only some are busy."""
        first = int(ipaddress.IPv4Address("239.1.1.1" if self.flows == 1 else "239.1.0.1"))
        groups = (str(ipaddress.IPv4Address(first + n)) for n in range(self.flows))
        return [Flow(labs.SOURCE_ADDRESS, group, PORT) for group in groups]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Section:
    """A part of the report. `x`: the Case's field that a plot has along its axis.

    share: of the rounds that it gets; above 1 where relays are so close that more turns are needed to tell.
    together: its cases are compared with each other, so they stand side by side, too, and take turns.
    search: with one output, also find the highest rate without loss. curve: and what comes out at several loads.
    quick: the cases of a quick run.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    measure: Measure = "load"
    x: str = "outputs"
    share: float = 1.0
    together: bool = False
    search: bool = False
    curve: bool = False
    quick: tuple[Case, ...] = ()


def _outputs(*numbers: int, **special: bool | int) -> tuple[Case, ...]:
    return tuple(Case(outputs=n, **special) for n in numbers)  # type: ignore[arg-type]  # fields of one kind each


SECTIONS: Final = (
    Section(
        "fan-out", "One flow, by fan-out", _outputs(1, 4, 8, 16, 64), search=True, curve=True,
        quick=_outputs(1, 4, 16),
    ),
    Section(
        "no-df", "One flow, senders without DF", _outputs(1, 4, 8, 16, df=False), share=1.5,
        quick=_outputs(1, df=False),
    ),
    Section(
        "interleaved", "200 interleaved flows", _outputs(1, 4, 16, flows=200), search=True,
        quick=_outputs(1, flows=200),
    ),
    Section("unmerged", "One flow, GRO off", _outputs(1, 4, 16, merge=False), quick=_outputs(1, merge=False)),
    Section("latency", "Latency", _outputs(1, 4), "latency", quick=_outputs(1)),
    Section("small", "Ten flows of small datagrams", (Case(flows=10, payload=64),), share=0.5),
    Section(
        "payload", "By payload",
        (*(Case(payload=n) for n in (64, 256, 1400)), Case(payload=8900, sender="udp")), x="payload", share=0.3,
    ),
    Section("no-offload", "No segmentation offload at egress", _outputs(1, 4, segment=False), share=0.5),
    Section(
        "rules", "By rules", tuple(Case(rules=n) for n in (1, 100, 1000, 10_000)), x="rules", share=0.5,
        together=True,
    ),
    Section(
        "established", "By established flows, one of them busy, GRO off",
        tuple(Case(flows=n, busy=1, merge=False) for n in (1, 100, 1000, 10_000)), x="flows",
        together=True,
    ),
    Section(
        "flows", "By flows", tuple(Case(flows=n, payload=200) for n in (1, 100, 1000, 10_000, 100_000)), x="flows",
        share=0.3,
    ),
    Section("hosts", "One flow to unicast hosts", (Case(hosts=1000),), x="hosts", share=0.5),
    Section(
        "senders", "Senders that use a socket", (Case(sender="udp"), Case(sender="udp-merged")), x="sender",
        share=0.3,
    ),
    Section("workers", "Two workers", (Case(flows=200, workers=2),), x="workers", share=0.5),
    Section("spacing", "Spacing at the receiver", (Case(),), "spacing", share=0.3),
    Section("changes", "Changes while it runs", (Case(),), "changes", share=0.5),
)  # fmt: skip


def prefix(flows: list[Flow]) -> str:
    """The smallest prefix that has all groups."""
    first, last = (int(ipaddress.IPv4Address(flows[at].group)) for at in (0, -1))
    return str(ipaddress.ip_network((first, 32 - (first ^ last).bit_length()), strict=False))
