"""Exact-match lookup of 10 to 1,000,000 flows for whole batches of packets in NumPy. See README.md.

Needs no privilege and no network: columns of keys in, slots out.
"""

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up

from lookup_bench import METHODS, TABLES, TRAFFIC, Bench, Costs
from lookup_keys import Mix, spoofed_flows, xor_of_products
from lookup_product import LIMIT, Product
from lookup_simple import EachPacket, Sorted, UniqueFirst
from lookup_tables import TwoPlaces

from experiment import Experiment

BATCH: Final = 1024  # packets
SIZES: Final = (16, 64, 256, 1024, 4096)
FEW, MANY = 1_000, 10_000  # flows


@dataclass
class Found:
    """What was measured: ns a packet by flows, by packets at once, by traffic; and the rest by method."""

    size: int
    by_flows: dict[int, Costs] = field(default_factory=dict)
    by_size: dict[int, Costs] = field(default_factory=dict)
    by_traffic: dict[str, Costs] = field(default_factory=dict)
    build: Costs = field(default_factory=dict)
    install: Costs = field(default_factory=dict)
    remove: Costs = field(default_factory=dict)
    memory: Costs = field(default_factory=dict)
    answers: int = 0
    wrong: int = 0
    homeless: int = 0


def main() -> None:
    """Measure, claim, say."""
    experiment = Experiment("poc_vector_flow_lookup", __doc__, premises=("verify", "sum", "batch"))
    found = measure(experiment)
    show(experiment, found)
    claim_lookup(experiment, found)
    claim_change(experiment, found)
    claim_hash(experiment)
    few, full = found.by_flows[FEW], found.by_flows[LIMIT]
    experiment.finish(
        f"ns a packet, {FEW:,} flows, {found.size} at once: dict {few[EachPacket]:.0f}, searchsorted "
        f"{few[Sorted]:.0f}, mrelay {few[Product]:.0f}, two places {few[TwoPlaces]:.0f}; mrelay with 10 flows "
        f"{found.by_flows[10][Product]:.0f}, with {LIMIT:,} {full[Product]:.0f} (two places {full[TwoPlaces]:.0f})"
    )


def measure(experiment: Experiment) -> Found:
    """All methods on all sets of flows, one set after the other."""
    counts = [10, FEW, MANY, LIMIT] + ([] if experiment.short else [1_000_000])
    found = Found(size=4 if experiment.broken == "batch" else BATCH)
    rounds = 15 if experiment.short else 40
    gc.disable()  # a million tuples are no rubbish: to look through them is not the methods' cost
    for count in counts:
        bench = Bench(count, trusting=experiment.broken == "verify")
        found.by_flows[count] = bench.measure(found.size, rounds)
        if count == FEW:
            found.by_size = {size: bench.measure(size, rounds) for size in SIZES}
        if count == MANY:
            found.by_traffic = {kind: bench.measure(found.size, rounds, kind) for kind in TRAFFIC}
            _measure_change(found, bench)
        if count == LIMIT:
            found.homeless = len(bench.homeless)
        found.answers, found.wrong = found.answers + bench.answers, found.wrong + bench.wrong
    return found


def _measure_change(found: Found, bench: Bench) -> None:
    found.build = bench.build
    for kind in METHODS:
        found.memory[kind] = bench.memory(kind)
        found.install[kind], found.remove[kind] = bench.change(kind)


def show(experiment: Experiment, found: Found) -> None:
    """The tables."""
    _show(experiment, f"ns a packet, by flows; {found.size} packets at once", found.by_flows)
    _show(experiment, f"ns a packet, by packets at once; {FEW:,} flows", found.by_size)
    _show(experiment, f"ns a packet, by traffic; {MANY:,} flows, {found.size} packets at once", found.by_traffic)
    columns = ["build, ns a flow", "install, µs", "remove, µs", "bytes a flow"]
    figures = [found.build, found.install, found.remove, found.memory]
    rows = [
        [kind.name, *(f"{each[kind]:.{digits}f}" for each, digits in zip(figures, (0, 1, 1, 0), strict=True))]
        for kind in METHODS
    ]
    experiment.table(f"Changing a table of {MANY:,} flows; its size beside the keys", ["", *columns], rows)


def _show(experiment: Experiment, title: str, costs: Mapping[int, Costs] | Mapping[str, Costs]) -> None:
    names = [f"{name:,}" if isinstance(name, int) else name for name in costs]
    rows = [[kind.name, *(f"{each[kind]:.0f}" for each in costs.values())] for kind in METHODS]
    experiment.table(title, ["", *names], rows)


def claim_lookup(experiment: Experiment, found: Found) -> None:
    """Whether the answers are right, and what they cost."""
    experiment.claim(
        "every method finds what the dict finds, and nothing else, for known and unknown keys",
        found.wrong == 0,
        f"{found.wrong} of {found.answers:,} answers differ",
    )
    gains = {
        (kind, count): costs[EachPacket] / costs[kind]
        for count, costs in found.by_flows.items()
        for kind in TABLES
    }
    kind, count = min(gains, key=gains.__getitem__)
    experiment.claim(
        f"{BATCH} packets at once: each table takes under 0.7 of what a dict takes packet by packet",
        gains[kind, count] > 1.4,
        f"least: 1/{gains[kind, count]:.1f} ({kind.name}, {count:,} flows)",
    )
    one, costs = SIZES[0], found.by_size[SIZES[0]]
    least = min(costs[kind] for kind in TABLES)
    experiment.claim(
        f"{one} packets at once: the dict is cheaper than mrelay's table, whose arrays have a fixed cost",
        costs[Product] > 1.2 * costs[EachPacket],
        f"ns a packet: dict {costs[EachPacket]:.0f}, mrelay {costs[Product]:.0f}, best table {least:.0f}",
    )
    ratios = {
        count: costs[UniqueFirst] / costs[Product] for count, costs in found.by_flows.items() if count >= FEW
    }
    experiment.claim(
        "sorting out repeated flows first (np.unique) costs more than mrelay's whole lookup",
        min(ratios.values()) > 1.3,
        ", ".join(f"{count:,} flows: {ratio:.1f} times" for count, ratio in ratios.items()),
    )
    behind = {
        count: costs[Product] / min(costs.values()) for count, costs in found.by_flows.items() if count <= MANY
    }
    experiment.claim(
        f"up to {MANY:,} flows mrelay's table is within four times of the best method, tens of ns",
        max(behind.values()) < 4,
        ", ".join(f"{count:,} flows: {ratio:.1f} times" for count, ratio in behind.items()),
    )


def claim_change(experiment: Experiment, found: Found) -> None:
    """Flows that come and go."""
    gains = {kind: found.build[kind] * MANY / 1000 / found.install[kind] for kind in TABLES}
    least = min(gains, key=gains.__getitem__)
    experiment.claim(
        f"installing one flow of {MANY:,} in a table costs under a twentieth of building it anew",
        gains[least] > 20,
        f"least: 1/{gains[least]:.0f} ({least.name})",
    )
    experiment.claim(
        f"with eight probes and a quarter full, under one flow in a thousand finds no place ({LIMIT:,} flows)",
        found.homeless < LIMIT / 1000,
        f"{found.homeless} flows",
    )


def claim_hash(experiment: Experiment) -> None:
    """What somebody who knows no factor can do to the hash."""
    words = list(spoofed_flows())
    xored = len(np.unique(xor_of_products(words)))
    summed = len(np.unique(xor_of_products(words) if experiment.broken == "sum" else Mix().many(words)))
    product = len(np.unique(Product.hash(words)))
    experiment.claim(
        "random factors alone do not help: XORed products of whole words collide by the top bits of two words",
        xored <= 1024,
        f"{len(words[0]):,} spoofed IPv6 sources have {xored:,} hashes",
    )
    experiment.claim(
        "a sum of products of 32-bit halves keeps them apart",
        summed > 0.99 * len(words[0]),
        f"{summed:,} hashes",
    )
    experiment.claim(
        "mrelay's table gives them places of their own, but for chance",
        product > 0.8 * len(words[0]),
        f"{product:,} of its places",
    )


if __name__ == "__main__":
    main()
