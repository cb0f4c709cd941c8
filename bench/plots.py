"""Pictures of a run, as SVG: throughput by fan-out, latency, cost by rules and flows, loss under overload.

Called by run_bench.py and page.py. Colours are Okabe and Ito's, which colour-blind people can tell apart; each
peer also has a marker of its own. Imports matplotlib, so only when asked to draw.
"""

from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any, Final

import measure
from cases import SECTIONS, Section
from results import Results

COLOURS: Final = ("#0072B2", "#56B4E9", "#CC79A7", "#009E73", "#D55E00", "#E69F00", "#999999", "#000000")
MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X", "*")
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mrelay",  # the same run, the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}
Draw = Callable[[Any, Results], bool]


def draw(results: Results, folder: Path) -> list[Path]:
    """All for which something was measured; the files made."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        for name, (columns, painter) in _PLOTS.items():
            figure, axes = plt.subplots(1, columns, figsize=(10 if columns > 1 else 8, 5.2), layout="constrained")
            if painter(axes, results):
                _legend(figure)
                made.append(folder / f"{name}.svg")
                figure.savefig(made[-1], metadata={"Date": None})
            plt.close(figure)
    return made


def _legend(figure: Any) -> None:
    """One for all of a picture, below it: every line once."""
    lines: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _look(results: Results, name: str) -> dict[str, Any]:
    at = list(results.peers).index(name)
    return {
        "color": COLOURS[at % len(COLOURS)],
        "marker": MARKERS[at % len(MARKERS)],
        "label": results.title(name),
        "linestyle": "-" if results.peers[name]["ours"] else "--",
        "markersize": 6,
    }


def _section(results: Results, name: str) -> Section | None:
    return next((section for section in results.sections() if section.name == name), None)


def _lines(axis: Any, results: Results, section: Section, figure: str, scale: float = 1.0) -> bool:
    """A line for each peer along the section's axis, with whiskers from the lowest to the highest round."""
    seen = False
    for name in results.names(section.name):
        points = []
        for case in results.cases(section.name):
            if found := results.figure(section.name, case, name, figure):
                points.append((getattr(case, section.x), found.median, found.low, found.high))
        if points:
            x, y, low, high = (list(column) for column in zip(*points, strict=True))
            y, low, high = ([value * scale for value in column] for column in (y, low, high))
            whiskers = [
                [a - b for a, b in zip(y, low, strict=True)],
                [b - a for a, b in zip(y, high, strict=True)],
            ]
            axis.errorbar(x, y, yerr=whiskers, capsize=3, **_look(results, name))
            seen = True
    return seen


def _plain_ticks(axis: Any, ticks: list[int]) -> None:
    """Powers of ten and the like as people write them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _big_numbers(axis: Any) -> None:
    """Along the y axis: 0.1 M, 20 M."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} M"))


def _fan_out(axes: Any, results: Results) -> bool:
    """Beside each other: merged and not."""
    seen = False
    for axis, name in zip(axes, ("fan-out", "interleaved"), strict=True):
        section = _section(results, name)
        if section and _lines(axis, results, section, "out", 1e-6):
            seen = True
            axis.set(xscale="log", yscale="log", xlabel="outputs", title=section.title)
            _plain_ticks(axis.xaxis, [case.outputs for case in results.cases(name)])
            _big_numbers(axis)
    axes[0].set_ylabel("datagrams out a second (log scale)")
    low, high = (pick(axis.get_ylim()[at] for axis in axes) for at, pick in enumerate((min, max)))
    for axis in axes:
        axis.set_ylim(low, high * 2)
    return seen


def _latency(axes: Any, results: Results) -> bool:
    """The distribution at the middle rate and at the highest: share of datagrams that took longer."""
    section = _section(results, "latency")
    if section is None:
        return False
    case = results.cases("latency")[0]
    for axis, rate in zip(axes, (20_000, 100_000), strict=True):
        for name in results.names("latency"):
            curves = [each.curve for each in results.of("latency", case, name, rate) if each.curve]
            if curves:
                delays = [sorted(column)[len(column) // 2] for column in zip(*curves, strict=True)]
                shares = [100 * share for share in measure.CURVE]
                points = [(d, s) for d, s in zip(delays, shares, strict=True) if not isnan(d)]
                axis.plot(
                    [d for d, _ in points], [s for _, s in points], **{**_look(results, name), "markersize": 4}
                )
        axis.set(xscale="log", xlabel="µs through the relay (log scale)", title=f"at {rate:,} datagrams a second")
        _percentiles(axis)
        _plain_ticks(axis.xaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000])
        axis.tick_params("x", labelrotation=45)
    axes[0].set_ylabel("percentile")
    return True


def _percentiles(axis: Any) -> None:
    """The y axis stretched towards 100 %, where it matters."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    def rarer(percent: Any) -> Any:
        return -np.log10(np.clip(100 - np.asarray(percent, float), 1e-3, None) / 100)

    def back(rare: Any) -> Any:
        return 100 - 100 * 10.0 ** -np.asarray(rare, float)

    axis.set_yscale("function", functions=(rarer, back))
    axis.set_ylim(0, 99.995)
    axis.yaxis.set_major_locator(FixedLocator([50, 90, 99, 99.9, 99.99]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def _cost(axes: Any, results: Results) -> bool:
    """By rules, by flows."""
    seen = False
    for axis, name in zip(axes, ("rules", "flows"), strict=True):
        section = _section(results, name)
        if section and _lines(axis, results, section, "cpu", 1e-3):
            seen = True
            what = "rules installed, one flow" if name == "rules" else "flows that all send"
            axis.set(xscale="log", xlabel=what, title=section.title)
            axis.set_ylim(bottom=0)
            _plain_ticks(axis.xaxis, [getattr(case, section.x) for case in results.cases(name)])
    axes[0].set_ylabel("processor time a datagram, µs")
    return seen


def _overload(axis: Any, results: Results) -> bool:
    """Out by offered, one output."""
    section = _section(results, "fan-out")
    seen = False
    for name in results.names("fan-out") if section else ():
        case = results.cases("fan-out")[0]
        found = {load: results.figure("fan-out", case, name, f"out_at_{load}") for load in measure.LOADS}
        points = [(load / 1e6, each.median / 1e6) for load, each in found.items() if each]
        if points:
            axis.plot([x for x, _ in points], [y for _, y in points], **_look(results, name))
            seen = True
    axis.plot([0.05, 4], [0.05, 4], color="#bbbbbb", lw=1, ls=":", label="all that is offered")
    axis.set(xscale="log", yscale="log", xlabel="offered a second", ylabel="out a second")
    axis.set_title("Overload: one flow, one output")
    _big_numbers(axis)
    from matplotlib.ticker import FuncFormatter

    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} M"))
    return seen


def _payload(axis: Any, results: Results) -> bool:
    section = _section(results, "payload")
    if section is None or not _lines(axis, results, section, "out", 1e-6):
        return False
    axis.set(
        xscale="log", yscale="log", xlabel="payload, bytes", ylabel="datagrams out a second", title=section.title
    )
    _plain_ticks(axis.xaxis, sorted(case.payload for case in results.cases("payload")))
    _big_numbers(axis)
    return True


_PLOTS: Final[dict[str, tuple[int, Draw]]] = {
    "fan-out": (2, _fan_out),
    "latency": (2, _latency),
    "cost": (2, _cost),
    "overload": (1, _overload),
    "payload": (1, _payload),
}
assert {"fan-out", "interleaved", "latency", "rules", "flows", "payload"} <= {each.name for each in SECTIONS}
