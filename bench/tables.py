"""The answer as tables: each once, for the terminal (rich) and for docs/performance.md (Markdown). Pure.

Owns how figures are written. A cell has the median and, where there are several rounds, the spread over them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Final

from rich.table import Table as RichTable

from cases import Case, Section
from results import Middle, Results
from targets import verdicts

Format = Callable[[float], str]


@dataclass(frozen=True)
class Table:
    """Text cells; the first `words` columns are left-aligned."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for n, head in enumerate(self.heads):
            table.add_column(head, justify="left" if n < self.words else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a page."""
        rule = [":--" if n < self.words else "--:" for n in range(len(self.heads))]
        return "\n".join("| " + " | ".join(row) + " |" for row in (self.heads, rule, *self.rows))


def count(value: float) -> str:
    """12,345 packets a second and the like, short."""
    if value >= 999_500:
        return f"{value / 1e6:.2f} M"
    return f"{value / 1e3:.0f} k" if value >= 9_950 else f"{value / 1e3:.1f} k" if value >= 995 else f"{value:.0f}"


def micro(value: float) -> str:
    """Microseconds."""
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def nano(value: float) -> str:
    """Nanoseconds."""
    return f"{value:,.0f}"


def middle(found: Middle | None, written: Format) -> str:
    """Median and spread."""
    if found is None:
        return "–"
    text = written(found.median)
    return text if found.low == found.high else f"{text} ({written(found.low)} – {written(found.high)})"


# ---- by section ------------------------------------------------------------------------------------


def of(results: Results, section: Section) -> list[Table]:
    """All tables of one section."""
    makers = {"load": _load, "latency": _latency, "spacing": _spacing, "changes": _changes}
    return makers[section.measure](results, section)


def _load(results: Results, section: Section) -> list[Table]:
    cases, names = results.cases(section.name), results.names(section.name)
    tables = [
        _by_case(results, section, f"{section.title}: datagrams out a second, overloaded", "out", count, cases)
    ]
    tables.append(_ratios(results, section, cases, names))
    cost = f"{section.title}: processor time for each datagram out, ns"
    tables.append(_by_case(results, section, cost, "cpu", nano, cases))
    if section.search:
        lossless = f"{section.title}: highest rate in with at most 0.001 % lost"
        tables.append(
            _by_case(results, section, lossless, "lossless", count, [c for c in cases if c.outputs == 1])
        )
    return [table for table in tables if table.rows]


def _label(section: Section, case: Case) -> str:
    """What distinguishes a case in its section."""
    value = getattr(case, section.x)
    if not isinstance(value, int):
        return str(value)
    unit = {"payload": "B"}.get(section.x, section.x.rstrip("s") if value == 1 else section.x)
    return f"{value:,} {unit}"


def _by_case(
    results: Results, section: Section, title: str, figure: str, written: Format, cases: Sequence[Case]
) -> Table:
    rows = []
    for name in results.names(section.name):
        found = [results.figure(section.name, case, name, figure) for case in cases]
        if any(found):
            rows.append((name, *(middle(each, written) for each in found)))
    return Table(title, ("", *(_label(section, case) for case in cases)), tuple(rows))


def _ratios(results: Results, section: Section, cases: Sequence[Case], names: Iterable[str]) -> Table:
    rows = []
    others = [name for name in names if not results.peers[name]["ours"]]
    for ours in names:
        for theirs in others if results.peers[ours]["ours"] else ():
            ratios = [_ratio(results, section.name, case, ours, theirs) for case in cases]
            if any(ratio != "–" for ratio in ratios):
                rows.append((f"{ours} / {theirs}", *ratios))
    return Table(
        f"{section.title}: times as many out", ("", *(_label(section, case) for case in cases)), tuple(rows)
    )


def _ratio(results: Results, section: str, case: Case, ours: str, theirs: str) -> str:
    ratio = results.ratio(section, case, ours, theirs)
    return "–" if ratio is None else f"{ratio:.2f}"


_DELAYS: Final = ("p50", "p90", "p99", "p99.9", "max")


def _latency(results: Results, section: Section) -> list[Table]:
    tables = []
    for case in results.cases(section.name):
        for rate in results.rates(section.name):
            rows = []
            for name in results.names(section.name):
                found = [results.figure(section.name, case, name, delay, rate) for delay in _DELAYS]
                lost = results.figure(section.name, case, name, "lost", rate)
                if any(found):
                    rows.append((name, *(middle(each, micro) for each in found), middle(lost, nano)))
            title = f"Latency at {rate:,}/s, {_label(section, case)}, µs"
            tables.append(Table(title, ("", *_DELAYS, "lost"), tuple(rows)))
    return tables


def _spacing(results: Results, section: Section) -> list[Table]:
    heads = ("", "sent every", "gap p50", "gap p99", "gap max", "arrive together", "delay p50", "delay p99")
    rows = []
    for rate in results.rates(section.name):
        for name in results.names(section.name):
            case = results.cases(section.name)[0]
            found = [
                middle(results.figure(section.name, case, name, figure, rate), micro)
                for figure in ("gap_p50", "gap_p99", "gap_max", "together", "delay_p50", "delay_p99")
            ]
            found[3] += " %"
            rows.append((name, f"{1e6 / rate:g}", *found))
    return [Table("Spacing at the receiver, µs", heads, tuple(rows))]


def _changes(results: Results, section: Section) -> list[Table]:
    heads = ("", "rule added to first datagram, ms", "worst", "10,000 rules put, ms", "lost while nothing changes",
             "by a reload", "by a restart", "by SIGKILL of each process")  # fmt: skip
    case = results.cases(section.name)[0]
    rows = []
    for name in results.names(section.name):
        times = [results.figure(section.name, case, name, figure) for figure in ("add", "add_worst", "put")]
        changes = ("lost_steady", "lost_reload", "lost_restart", "lost_killed")
        lost = [results.figure(section.name, case, name, figure) for figure in changes]
        rows.append((name, *(middle(f, micro) for f in times), *(middle(f, nano) for f in lost)))
    return [Table("Changes while 100,000 datagrams a second pass", heads, tuple(rows))]


# ---- over all --------------------------------------------------------------------------------------


def peers(results: Results) -> Table:
    """Who is who."""
    rows = ((name, str(peer["title"]), str(peer["version"])) for name, peer in results.peers.items())
    return Table("Peers", ("", "what", "version"), tuple(rows), words=3)


_MAIN: Final = ("mrelay-tc", "mrelay-uring", "smcroute", "socat")


def summary(results: Results) -> Table:
    """The few figures that say most: medians."""
    rows = []
    for section in results.sections():
        if section.name in ("fan-out", "interleaved"):
            for case in results.cases(section.name):
                what = "one flow" if case.flows == 1 else f"{case.flows} interleaved flows"
                found = [results.figure(section.name, case, name, "out") for name in _MAIN]
                rows.append((f"{what}, {_label(section, case)}", *(_short(each, count) for each in found)))
        if section.name == "latency":
            rows += [_delays(results, section, rate) for rate in results.rates("latency")]
    return Table("Datagrams out a second, and latency", ("", *_MAIN), tuple(rows))


def _delays(results: Results, section: Section, rate: int) -> tuple[str, ...]:
    cells = []
    for name in _MAIN:
        found = [results.figure(section.name, Case(), name, figure, rate) for figure in ("p50", "p99")]
        cells.append(" / ".join(_short(each, micro) for each in found))
    return (f"latency at {rate:,}/s, p50 / p99, µs", *cells)


def _short(found: Middle | None, written: Format) -> str:
    return written(found.median) if found else "–"


def judged(results: Results) -> Table:
    """Every target of which both sides were measured."""
    rows = []
    for verdict in verdicts(results):
        t = verdict.target
        sign = "at most" if t.at_most else "at least"
        outputs = f"{t.case.outputs} output" + ("s" if t.case.outputs > 1 else "")
        word = "met" if verdict.met else "MISSED"
        rows.append((t.what, t.theirs, outputs, f"{sign} {t.factor:g}", f"{verdict.ratio:.2f}", word))
    return Table("Targets, as ratios", ("", "against", "at", "target", "measured", ""), tuple(rows), words=4)


def memory(results: Results) -> Table:
    """Of each peer in the first case that it was measured in."""
    rows = []
    for name in results.peers:
        found = [each for each in results.samples if each.peer == name and "pss" in each.figures]
        if found:
            at = (found[0].section, found[0].case, name)
            pss, maps = (results.figure(*at, figure) for figure in ("pss", "maps"))
            rows.append((name, middle(pss, micro), middle(maps, micro)))
    return Table("Memory, MB", ("", "processes (PSS)", "BPF maps in the kernel"), tuple(rows))


def losses(results: Results) -> Table:
    """Where what was too much ended, in the first section: of what is offered as overload, one output."""
    rows = []
    section = results.sections()[0]
    for name in results.names(section.name) if section.measure == "load" else ():
        case = results.cases(section.name)[0]
        figures = [
            results.figure(section.name, case, name, figure)
            for figure in ("lost", "lost_ring", "lost_relay", "lost_egress")
        ]
        if all(figures):
            rows.append((name, *(middle(figure, count) for figure in figures)))
    heads = ("", "lost", "before the relay", "by the relay's counters", "to the sink")
    return Table("Overload: where datagrams were lost, one output", heads, tuple(rows))


def room(results: Results) -> Table:
    """Whether generator and sink could have done more: the largest share of what they had.

    Senders that use a socket make what they can; the notes say where that was too little.
    """
    load = [sample for sample in results.samples if "offered" in sample.figures]
    rows = []
    for name in results.peers:
        own = [sample for sample in load if sample.peer == name]
        if own:
            made = [s.figures["offered"] / s.figures["wanted"] for s in own if s.case.sender == "xdp"]
            shares, stolen = ([s.figures[f] for s in own] for f in ("sink_share", "busy_core_steal"))
            share = max((each for each in shares if not isnan(each)), default=0.0)
            offered = f"{100 * min(made):.0f} %" if made else "–"
            rows.append((name, offered, f"{share:.1f} %", f"{max(stolen):.1f} %"))
    heads = ("", "offered, of what was wanted, at least", "sink's share of its core, at most", "stolen, at most")
    return Table("Room: generator, sink, machine", heads, tuple(rows))
