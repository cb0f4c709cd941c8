"""What a soak run saw, judged and drawn. Pure but for /proc in `Sample.of` and the picture; called by soak.py."""

import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

TICKS: Final = os.sysconf("SC_CLK_TCK")
GROWTH_KB: Final = 1024.0  # memory may grow by this much over the second half, and by
GROWTH: Final = 0.03  # this share of itself: allocators settle, leaks of a long run do not stop there
LEAST_SPAN: Final = 30.0  # seconds that memory is looked at: less shows how a fresh process settles, not a leak
POOL: Final = 1 + min(32, (os.cpu_count() or 1) + 4)  # control and its thread pool, which fills as it is used
CUT_SHORT: Final = 64  # datagrams that a killed worker may have sent twice or counted wrongly: its batch
STEADY: Final = ("small", "large", "fragments", "many", "six")  # streams that nothing but kills may touch
Verdict = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment: seconds since the start, kB, seconds of processor time, and counts."""

    role: str
    pid: int
    at: float
    pss: float
    rss: float
    cpu: float
    descriptors: int
    sockets: int
    threads: int

    @classmethod
    def of(cls, role: str, pid: int, at: float) -> Self:
        """From proc(5). FileNotFoundError or ProcessLookupError when it is gone."""
        proc = Path("/proc", str(pid))
        memory = dict(line.split(":") for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        links = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
        return cls(
            role,
            pid,
            round(at, 2),
            float(memory["Pss"].split()[0]),
            float(memory["Rss"].split()[0]),
            (int(fields[11]) + int(fields[12])) / TICKS,
            len(links),
            sum(link.startswith("socket:") for link in links),
            int(fields[17]),
        )


@dataclass(frozen=True)
class Run:
    """All of it. `trouble`: when, what. `streams`: sent, received and so on. `stats`, `workers`: the API's."""

    seconds: float
    samples: list[Sample]
    trouble: list[tuple[float, str]]
    streams: list[dict[str, Any]]
    stats: dict[str, Any]
    workers: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def series(self) -> dict[tuple[str, int], list[Sample]]:
        """The samples of each process, by role and pid."""
        found: dict[tuple[str, int], list[Sample]] = {}
        for sample in self.samples:
            found.setdefault((sample.role, sample.pid), []).append(sample)
        return found

    def kills(self, role: str) -> int:
        """How many of a role were killed."""
        return sum(what == f"kill_{role}" for _, what in self.trouble)


def slope(at: list[float], value: list[float]) -> float:
    """Theil and Sen's: the median slope of all pairs, which single jumps don't move. Units of value a second."""
    x, y = np.array(at), np.array(value)
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def verdicts(run: Run) -> list[Verdict]:
    """Everything that has to hold."""
    return [*_flat(run), *_counters(run), *_loss(run)]


def _verdict(what: str, ok: bool, found: str) -> Verdict:
    return {"what": what, "ok": bool(ok), "found": found}


def _flat(run: Run) -> list[Verdict]:
    """Of the processes that lived through the second half, in which none is killed."""
    found = []
    for (role, pid), samples in run.series().items():
        late = [s for s in samples if s.at >= run.seconds / 2]
        if len(late) < 8 or late[-1].at < run.seconds * 0.9 or late[0].at > run.seconds * 0.6:
            continue
        late_in = late[len(late) // 5 :]  # the last to be killed may just have started
        at = [s.at for s in late_in]
        span, pss = at[-1] - at[0], [s.pss for s in late_in]
        growth = slope(at, pss) * span
        allowed = GROWTH_KB + GROWTH * float(np.median(pss))
        text = f"{growth:+.0f} kB in {span:.0f} s, at {np.median(pss):.0f} kB (allowed {allowed:.0f})"
        if span >= LEAST_SPAN:
            found.append(_verdict(f"memory of {role} {pid} is flat", growth <= allowed, text))
        for what in ("descriptors", "sockets", "threads"):
            counts = [getattr(s, what) for s in late]
            before, after = max(counts[: len(counts) // 2]), counts[-1]
            if what == "threads" and role == "control":
                before = max(before, POOL)
            found.append(_verdict(f"{what} of {role} {pid} are flat", after <= before, f"{before}, then {after}"))
    roles = {verdict["what"].split()[2] for verdict in found}
    missing = {"supervisor", "control", "worker"} - roles
    found.append(_verdict("each role was judged", not missing, f"missing: {missing or 'none'}"))
    return found


def _counters(run: Run) -> list[Verdict]:
    stats = run.stats
    total = stats["matched"] + sum(stats["drops"].values())
    sent = sum(stream["sent"] for stream in run.streams)
    slack = CUT_SHORT * run.kills("worker")
    off = stats["received"] - sent
    restarts = sum(worker["restarts"] for worker in run.workers)
    return [
        _verdict("received = matched + drops", stats["received"] == total, f"{stats['received']} and {total}"),
        _verdict("all that was sent was received", abs(off) <= slack, f"{off:+d} of {sent}, {slack} allowed"),
        _verdict("no worker died but by us", restarts == run.kills("worker"), f"{restarts} restarts"),
    ]


def _loss(run: Run) -> list[Verdict]:
    """Each lost datagram has a reason that the relay counted, or was sent while its link was struck."""
    by_name, drops = {stream["name"]: stream for stream in run.streams}, run.stats["drops"]
    slack = CUT_SHORT * run.kills("worker")
    steady = sum(by_name[name]["lost"] for name in STEADY)
    limited, struck = by_name["limited"], by_name["struck"]
    unlimited = limited["lost"] - drops["rate_limited"]
    silent = [stream["name"] for stream in run.streams if not stream["received"]]
    return [
        _verdict("every stream arrives", not silent, f"nothing of {silent}" if silent else "yes"),
        _verdict(
            "untouched streams lose what ring_full counts",
            steady <= drops["ring_full"] + slack,
            f"{steady} lost, ring_full {drops['ring_full']}, {slack} for batches cut short",
        ),
        _verdict(
            "the limited stream loses what rate_limited counts",
            abs(unlimited) <= drops["ring_full"] + slack,
            f"{limited['lost']} lost, rate_limited {drops['rate_limited']}",
        ),
        _verdict(
            "the struck stream loses nothing but while its link is struck",
            struck["lost"] <= struck["sent_in_trouble"] + drops["ring_full"] + slack,
            f"{struck['lost']} lost, {struck['sent_in_trouble']} sent then",
        ),
    ]


def draw(run: Run, file: Path) -> None:
    """Six panels over time, a line for each process, and where trouble was."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(14, 11), sharex=True, layout="constrained")
    panels = {"pss": "PSS, MB", "cpu": "CPU, % of a core", "descriptors": "descriptors", "sockets": "sockets"}
    colours = {"supervisor": "tab:green", "control": "tab:blue", "worker": "tab:orange"}
    for axis, (what, title) in zip(axes.flat, [*panels.items(), ("threads", "threads")], strict=False):
        for (role, pid), samples in run.series().items():
            at, values = _line(samples, what)
            axis.plot(at, values, ".-", ms=3, lw=1, color=colours[role], label=f"{role} {pid}")
        for when, name in run.trouble:
            axis.axvline(when, color="red" if name.startswith("kill") else "lightgrey", lw=0.7, zorder=0)
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    axes.flat[0].legend(fontsize=7, ncols=2)
    axes.flat[5].remove()
    bars = figure.add_subplot(3, 2, 6)
    names = [stream["name"] for stream in run.streams]
    bars.bar(names, [stream["sent"] for stream in run.streams], color="lightgrey", label="sent")
    bars.bar(names, [stream["received"] for stream in run.streams], width=0.5, label="received")
    bars.set_title("datagrams")
    bars.legend()
    figure.suptitle(f"{run.seconds:.0f} s; red: a process killed; grey: rules, reloads, link flaps")
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _line(samples: list[Sample], what: str) -> tuple[list[float], list[float]]:
    if what == "pss":
        return [s.at for s in samples], [s.pss / 1024 for s in samples]
    if what != "cpu":
        return [s.at for s in samples], [float(getattr(s, what)) for s in samples]
    pairs = list(pairwise(samples))
    return [b.at for _, b in pairs], [100 * (b.cpu - a.cpu) / max(b.at - a.at, 0.01) for a, b in pairs]
