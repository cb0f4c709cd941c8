"""The benchmark's tables, pictures and page."""

import math
from pathlib import Path

import pytest
from rich.console import Console

import measure
import page
import plots
import run_bench
import tables
from cases import SECTIONS, Case
from results import Middle, Results, Sample

PEERS = ("mrelay-tc", "mrelay-uring", "smcroute", "socat")


def whole() -> Results:
    """A run of two rounds in which every section was measured."""
    facts = {"cpu": "a CPU", "cpus": 2, "virtual": "kvm", "kernel": "Linux", "python": "3.11", "commit": "abc",
             "cores": {"source": 0, "relay": 1, "sink": 1, "second": None}}  # fmt: skip
    about = {name: {"title": name.title(), "version": "1", "ours": "mrelay" in name} for name in PEERS}
    samples = [
        Sample(
            section.name, case, name, number, rate, figures(section.measure, 10.0 * place + number), curve(rate)
        )
        for section in SECTIONS
        for case in section.cases
        for place, name in enumerate(PEERS, 1)
        for number in (1, 2)
        for rate in ((20_000, 100_000) if section.measure in ("latency", "spacing") else (0,))
    ]
    return Results(
        facts,
        {"started": "2026-01-01T00:00:00", "rounds": 2, "quick": False},
        about,
        samples,
        seconds=60.0,
        complete=True,
    )


def figures(kind: str, base: float) -> dict[str, float]:
    if kind == "load":
        zero = dict.fromkeys(("maps", "lost_relay", "lost_egress", "busy_core_steal"), 0.0)
        given = {"offered": 3e6, "wanted": 3e6, "lost": 5.0, "lost_ring": 5.0, "sink_share": 1.0}
        own = {"out": base * 1e5, "cpu": base * 10, "lossless": base * 1e4, "pss": base}
        return {**zero, **given, **own, **{f"out_at_{load}": min(load, base * 1e5) for load in measure.LOADS}}
    if kind == "latency":
        return {**dict.fromkeys(measure.SHARES, base), "lost": 0.0, "sent": 1000.0}
    if kind == "spacing":
        return {f"{what}_{name}": base for what in ("gap", "delay") for name in measure.SHARES} | {"together": 3.0}
    return {"add": base, "add_worst": 2 * base, "lost_steady": 0.0, "lost_reload": 0.0, "lost_restart": 7.0}


def curve(rate: int) -> list[float]:
    return [3.0 + n for n in range(len(measure.CURVE))] if rate else []


def test_cells() -> None:
    assert [tables.count(n) for n in (999.0, 1000.0, 12_345.0, 999_500.0, 12.3e6)] == [
        "1.0 k", "1.0 k", "12 k", "1.00 M", "12.30 M"
    ]  # fmt: skip
    assert tables.count(12) == "12"
    assert tables.middle(None, tables.count) == "–"
    assert tables.middle(Middle(2.0, 2.0, 2.0), tables.micro) == "2.0"
    assert tables.middle(Middle(2.0, 1.0, 300.0), tables.micro) == "2.0 (1.0 – 300)"


def test_tables_of_every_section() -> None:
    results = whole()
    for section in SECTIONS:
        for table in tables.of(results, section):
            assert table.rows, table.title
            assert all(len(row) == len(table.heads) for row in table.rows), table.title
            assert len(table.markdown().splitlines()) == len(table.rows) + 2


def test_ratios_are_ours_over_theirs() -> None:
    ratios = next(t for t in tables.of(whole(), SECTIONS[0]) if "times as many" in t.title)
    assert [row[0] for row in ratios.rows] == [f"{a} / {b}" for a in PEERS[:2] for b in PEERS[2:]]
    assert ratios.rows[0][1] == f"{(11 / 31 + 12 / 32) / 2:.2f}"


def test_a_ratio_is_of_the_same_turns() -> None:
    """What slows the machine down in one of them is on both sides; a turn without its other is left out."""

    def turns(peer: str, number: int, *out: float) -> list[Sample]:
        return [Sample("fan-out", Case(), peer, number, 0, {"out": each}, []) for each in out]

    results = whole()
    results.samples = [
        *turns("mrelay-tc", 1, 400.0, 200.0, math.nan, 4000.0),
        *turns("smcroute", 1, 100.0, 50.0),
        *turns("mrelay-tc", 2, 90.0, 2000.0),
        *turns("smcroute", 2, 30.0),
        *turns("mrelay-uring", 3, 7.0),
    ]
    assert results.ratio("fan-out", Case(), "mrelay-tc", "smcroute") == 4.0
    assert results.ratio("fan-out", Case(), "mrelay-uring", "smcroute") is None
    assert results.ratio("fan-out", Case(), "mrelay-tc", "smcroute", "cpu") is None


def test_shown_in_a_terminal() -> None:
    console = Console(record=True, width=200)
    run_bench.show(whole(), console)
    text = console.export_text()
    for word in (
        "One flow, by fan-out",
        "Latency at 20,000/s",
        "Targets",
        "MISSED",
        "relay and sink share one",
        "Memory",
    ):
        assert word in text


def test_drawn(tmp_path: Path) -> None:
    made = plots.draw(whole(), tmp_path)
    assert {file.name for file in made} == {
        "fan-out.svg",
        "latency.svg",
        "cost.svg",
        "overload.svg",
        "payload.svg",
    }
    for file in made:
        text = file.read_text()
        assert "Mrelay-Tc" in text, "text stays text, and lines are named"
    again = plots.draw(whole(), tmp_path / "again")
    assert [a.read_text() for a in made] == [b.read_text() for b in again], "the same run, the same picture"


def test_drawn_from_what_there_is(tmp_path: Path) -> None:
    results = whole()
    results.samples = [sample for sample in results.samples if sample.section == "latency"]
    assert [file.name for file in plots.draw(results, tmp_path)] == ["latency.svg"]
    results.samples = []
    assert plots.draw(results, tmp_path) == []


def test_nothing_arrived(tmp_path: Path) -> None:
    """A peer that lost everything at a rate has no delays: no figure, no crash."""
    results = whole()
    for sample in results.samples:
        if sample.section == "latency" and sample.peer == "socat":
            sample.figures.update(dict.fromkeys(measure.SHARES, math.nan))
            sample.curve[:] = [math.nan] * len(measure.CURVE)
    plots.draw(results, tmp_path)
    latency = next(section for section in SECTIONS if section.name == "latency")
    assert all("nan" not in table.markdown() for table in tables.of(results, latency))


def test_page_is_filled_and_prose_stays() -> None:
    end = "<!-- /bench -->\n"
    text = f"Prose.\n\n<!-- bench:targets -->\nold\n{end}\nMore.\n\n<!-- bench:latency -->\n{end}"
    once = page.filled(text, whole())
    assert "old" not in once
    assert once.startswith("Prose.\n")
    assert "\nMore.\n" in once
    assert "| fast path, one flow | smcroute | 1 output |" in once
    assert "Latency at 20,000/s" in once
    assert page.filled(once, whole()) == once
    with pytest.raises(ValueError, match=r"nonsense.*machine"):
        page.filled("<!-- bench:nonsense -->\n<!-- /bench -->", whole())


def test_pages_are_of_the_recorded_run() -> None:
    """And all parts that they have are known."""
    assert page.main(["--check"]) == 0, "remedy: .venv/bin/python bench/page.py"
    for each in page.PAGES:
        page.filled(each.read_text(), whole())


def test_a_section_that_was_left_out_says_so() -> None:
    results = whole()
    results.samples = [sample for sample in results.samples if sample.section != "workers"]
    assert "four cores" in page.filled("<!-- bench:workers -->\n<!-- /bench -->", results)


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench.main(["--only", "nowhere"]) == 1
    assert "no section nowhere; there are: fan-out" in capsys.readouterr().err
    assert run_bench.main(["--peers", "nobody"]) == 1
    assert "no peer nobody; there are: mrelay-tc" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_bench.main(["--list", "--only", "hosts", "--rounds", "1"])
    assert ended.value.code == 0
    assert "1000" in capsys.readouterr().out.replace(",", "")
