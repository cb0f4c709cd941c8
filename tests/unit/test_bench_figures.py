"""The benchmark's arithmetic: search for the lossless rate, histograms, medians, verdicts, plan, costs."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import costs
import histogram
import lab as labs
import measure
import peers
import plan
import results
import run_bench
import targets
from cases import SECTIONS, Case
from measure import Setup
from plan import Choice, Clock
from results import Results, Sample
from search import GROSS, LOSS, RANGE, highest

CORES = labs.Cores.chosen({0, 1})


# ---- search ----------------------------------------------------------------------------------------


def relay(limit: float, trials: list[float]) -> Callable[[float], float]:
    """One that loses what is above its limit."""

    def loss_at(rate: float) -> float:
        trials.append(rate)
        return max(0.0, 1 - limit / rate)

    return loss_at


@given(st.floats(1e5 / RANGE * 1.3, 1e5))
def test_search_finds_the_limit(limit: float) -> None:
    trials: list[float] = []
    found = highest(relay(limit, trials), 1e5, 8)
    assert limit / RANGE ** (1 / 2**8) * 0.99 <= found <= limit * (1 + 2 * LOSS)
    assert len(trials) <= 1 + 2 * 9


def test_search_is_quick_when_there_is_nothing_to_search() -> None:
    trials: list[float] = []
    assert highest(relay(2e5, trials), 1e5, 8) == 1e5
    assert len(trials) == 1
    assert highest(lambda rate: 1.0, 1e5, 4) == 0.0


def test_a_small_loss_is_tried_again_and_a_gross_one_not() -> None:
    losses = iter([GROSS / 2, 0.0])
    assert highest(lambda rate: next(losses), 1000.0, 0) == 1000.0
    losses = iter([GROSS * 2, 0.0])
    assert highest(lambda rate: next(losses), 1000.0, 0) == 0.0


# ---- histograms ------------------------------------------------------------------------------------


def bucket(value: int) -> int:
    """As in load.bpf.c."""
    octave = max(0, value.bit_length() - 1)
    if octave < histogram.FINE:
        return value
    return ((octave - histogram.FINE + 1) << histogram.FINE) + (
        value >> (octave - histogram.FINE) & ((1 << histogram.FINE) - 1)
    )


@given(st.integers(0, 2**63))
def test_buckets_hold_what_they_say(value: int) -> None:
    at = bucket(value)
    assert histogram.BOUNDS[at] <= value
    assert value < histogram.BOUNDS[at + 1] or math.isclose(value, histogram.BOUNDS[at + 1])
    assert histogram.BOUNDS[at + 1] - histogram.BOUNDS[at] <= max(1, value / 32)


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=200))
def test_quantiles_are_within_a_bucket(values: list[int]) -> None:
    counts = np.zeros(histogram.BUCKETS, np.uint64)
    for value in values:
        counts[bucket(value)] += 1
    middle, top = histogram.quantiles(counts, [0.5, 1.0])
    exact = sorted(values)[max(0, math.ceil(len(values) / 2) - 1)]
    assert abs(middle - exact) <= 1 + exact / 32
    assert max(values) <= top <= max(values) * 1.04 + 1


def test_no_values_no_quantiles() -> None:
    assert math.isnan(histogram.quantiles(np.zeros(histogram.BUCKETS, np.uint64), [0.5])[0])


# ---- results and targets ---------------------------------------------------------------------------


USUAL = Case()


def sample(peer: str, number: int, /, *about: Any, **figures: float) -> Sample:
    """`about`: section and case."""
    section, case = (*about, "fan-out", USUAL)[:2] if not about else (*about, USUAL)[:2]
    return Sample(section, case, peer, number, 0, figures, [])


def run(*samples: Sample) -> Results:
    facts = {"cores": {"relay": 1, "sink": 1}}
    titles = {name: {"title": name.upper(), "version": "1", "ours": "mrelay" in name} for name in
              ("mrelay-tc", "mrelay-uring", "smcroute", "smcroute-gro", "socat")}  # fmt: skip
    return Results(facts, {"rounds": 3}, titles, list(samples))


def test_medians_leave_out_what_was_not_measured() -> None:
    found = run(*(sample("socat", n, out=value) for n, value in enumerate([1.0, 9.0, 2.0, math.nan])))
    middle = found.figure("fan-out", Case(), "socat", "out")
    assert middle is not None
    assert (middle.median, middle.low, middle.high) == (2.0, 1.0, 9.0)
    assert found.figure("fan-out", Case(outputs=4), "socat", "out") is None
    assert found.figure("fan-out", Case(), "socat", "lossless") is None


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    whole = run(
        sample("socat", 1, out=math.nan, cpu=1234.5678), sample("socat", 2, "fan-out", Case(outputs=4), out=2.0)
    )
    whole.problems.append("a problem")
    whole.save(tmp_path / "result.json")
    again = Results.load(tmp_path / "result.json")
    assert again.samples[1] == whole.samples[1]
    assert math.isnan(again.samples[0].figures["out"])
    assert again.samples[0].figures["cpu"] == pytest.approx(1234.57)
    assert again.problems == ["a problem"]
    (tmp_path / "old.json").write_text('{"version": 0}')
    with pytest.raises(ValueError, match="measure again"):
        Results.load(tmp_path / "old.json")


def test_verdicts() -> None:
    met = run(sample("mrelay-tc", 1, out=8e6), sample("smcroute", 1, out=2e6))
    (one,) = targets.verdicts(met)
    assert (one.ratio, one.met, one.target.factor) == (4.0, True, 4.0)
    missed = run(sample("mrelay-tc", 1, out=7e6), sample("smcroute", 1, out=2e6))
    assert not targets.verdicts(missed)[0].met
    case = Case(merge=False)
    cheap = run(
        *(sample(name, 1, "unmerged", case, cpu=cpu) for name, cpu in (("mrelay-tc", 40.0), ("smcroute", 100.0)))
    )
    (one,) = targets.verdicts(cheap)
    assert one.met
    assert one.target.at_most


def test_every_target_can_be_measured() -> None:
    """Its case is one of its section's, and both sides take part in it."""
    sections, everybody = {s.name: s for s in SECTIONS}, {peer.name: peer for peer in peers.load()}
    for target in targets.TARGETS:
        section = sections[target.section]
        assert target.case in section.cases, target
        assert everybody[target.ours].can(section, target.case), target
        assert everybody[target.theirs].can(section, target.case), target


def test_no_room_is_said() -> None:
    figures = {"offered": 1e6, "wanted": 3e6, "out": 1e6, "lost": 1000.0, "lost_egress": 900.0}
    turn = {name: figures[name] for name in ("offered", "wanted", "out")}
    remarks = run(sample("mrelay-tc", 1, **turn), sample("mrelay-tc", 1, **figures)).remarks()
    assert sum("generator was the limit" in remark for remark in remarks) == 1, "once for all turns of a step"
    assert any("sink was the limit" in remark for remark in remarks)
    assert not run(sample("mrelay-tc", 1, **{**figures, "offered": 3e6, "lost_egress": 0.0})).remarks()


# ---- costs -----------------------------------------------------------------------------------------


def test_spent() -> None:
    core = dict.fromkeys(("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"), 0.0)
    before = costs.Snapshot(0.0, 0.0, 0.0, 0.0, core, core)
    after = costs.Snapshot(1.0, 3.0, 0.8, 0.2, {**core, "softirq": 0.5}, {**core, "idle": 1.0})
    found = costs.spent(before, after, 2.0, 1_000_000)
    assert found["cpu"] == pytest.approx(1000)
    assert found["cpu_user"] == pytest.approx(200), "split as sampled, of what was exactly taken"
    assert found["cpu_system"] == pytest.approx(600)
    assert found["cpu_network"] == pytest.approx(200)
    assert found["core_softirq"] == 25
    assert found["sink_idle"] == 50
    assert math.isnan(costs.spent(before, after, 2.0, 0)["cpu"])


# ---- turns -----------------------------------------------------------------------------------------


def entry(name: str) -> measure.Entry:
    peer: Any = SimpleNamespace(name=name)
    return measure.Entry(peer, Case())


def relay_named(name: str) -> Any:
    return SimpleNamespace(name=name, programs=SimpleNamespace(drained=lambda: None))


def test_relays_take_turns_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """To and fro. One that fails takes no part any more; the others do; what takes no turns is with the last."""
    turns: list[str] = []

    def overload(_: Setup, bench: Any) -> dict[str, float]:
        turns.append(bench.name)
        if turns.count("bad") == 2 and bench.name == "bad":
            raise RuntimeError("it ended")
        return {"out": float(len(turns))}

    lost = iter(range(100))
    stages = SimpleNamespace(of=lambda _: SimpleNamespace(since=lambda _: {"lost": float(next(lost))}))
    monkeypatch.setattr(measure, "_overload", overload)
    monkeypatch.setattr(measure, "_cost", lambda *_: {"cpu": 1.0})
    monkeypatch.setattr(measure, "_once", lambda *_: {"pss": 7.0})
    monkeypatch.setattr(measure, "_Stages", stages)
    names = ("one", "bad", "two")
    found = {name: measure.Finding(entry(name)) for name in names}
    entrants: list[Any] = [measure._Entrant(found[name], relay_named(name), stages.of(None)) for name in names]
    measure._take_turns(Setup(CORES), SECTIONS[0], entrants)
    assert turns == ["one", "bad", "two", "two", "bad", "one", "one", "two", "two", "one"]
    assert [len(each.outcomes) for each in found.values()] == [measure.TURNS, 1, measure.TURNS]
    assert [each.problem for each in found.values()] == ["", "it ended", ""]
    assert [sorted(each.figures) for each in found["two"].outcomes] == [
        ["cpu", "out"], ["out"], ["cpu", "out"], ["lost", "out", "pss"]
    ]  # fmt: skip


def test_one_that_does_not_stop_in_order_is_noted_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found of it stays, and the others are stopped."""
    stopped = []

    @contextlib.contextmanager
    def bench(_: Setup, entry: Any) -> Iterator[Any]:
        yield relay_named(entry.peer.name)
        stopped.append(entry.peer.name)
        if entry.peer.name == "bad":
            raise RuntimeError("it does not end")

    stages = SimpleNamespace(of=lambda _: SimpleNamespace(since=lambda _: {}))
    for name, what in (
        ("_bench", bench), ("_learn", lambda _: None), ("_Stages", stages), ("_once", lambda *_: {}),
        ("_overload", lambda *_: {"out": 1.0}), ("_cost", lambda *_: {}),
    ):  # fmt: skip
        monkeypatch.setattr(measure, name, what)
    some = [entry(name) for name in ("one", "bad", "two")]
    found = measure._loads(Setup(CORES), SECTIONS[0], some)
    assert [each.problem for each in found] == ["", "it does not end", ""]
    assert [len(each.outcomes) for each in found] == [measure.TURNS] * 3
    assert sorted(stopped) == ["bad", "one", "two"]


# ---- plan ------------------------------------------------------------------------------------------


def test_peers_take_turns_and_begin_in_turn() -> None:
    everybody = peers.load()
    setup = Setup(CORES)
    steps = plan.steps(Choice(sections=["fan-out"], rounds=2), everybody, setup)
    first = [
        [each.peer.name for step in steps if step.round == n for each in step.entries if each.case == Case()]
        for n in (1, 2)
    ]
    assert sorted(first[0]) == sorted(first[1])
    assert first[0] != first[1]
    assert {each.case.outputs for step in steps for each in step.entries} == {1, 4, 8, 16, 64}
    assert all(len({each.case for each in step.entries}) == 1 for step in steps)


def test_close_ones_have_more_rounds() -> None:
    steps = plan.steps(Choice(sections=["fan-out", "no-df"], rounds=4), peers.load(), Setup(CORES))
    assert {step.round for step in steps if step.section.name == "fan-out"} == {1, 2, 3, 4}
    assert {step.round for step in steps if step.section.name == "no-df"} == {1, 2, 3, 4, 5, 6}


def test_cases_that_are_compared_take_turns_too() -> None:
    (step,) = plan.steps(
        Choice(sections=["established"], peers=["mrelay-tc"], rounds=1), peers.load(), Setup(CORES)
    )
    assert sorted(each.case.flows for each in step.entries) == [1, 100, 1000, 10_000]
    assert "4 cases side by side: mrelay-tc" in str(step)


def test_how_long_it_takes() -> None:
    """Seventy minutes, and quick under five, with all peers there."""
    everybody = peers.load()
    full = plan.steps(Choice(), everybody, Setup(CORES))
    assert sum(step.seconds for step in full) < 70 * 60
    quick = replace(Setup(CORES), **run_bench.QUICK)
    steps = plan.steps(Choice(rounds=1, quick=True), everybody, quick)
    assert sum(step.seconds for step in steps) < 5 * 60
    assert {step.section.name for step in steps} >= {"fan-out", "interleaved", "latency"}


def test_two_workers_want_a_core_each() -> None:
    everybody, few, many = peers.load(), CORES, labs.Cores.chosen({0, 1, 2, 3})
    assert not plan.steps(Choice(sections=["workers"]), everybody, Setup(few))
    assert plan.steps(Choice(sections=["workers"]), everybody, Setup(many))
    assert many.sink not in (many.source, many.relay, many.second)
    with pytest.raises(ValueError, match="two cores"):
        labs.Cores.chosen({3})


def test_clock_learns_the_pace() -> None:
    clock = Clock(100.0)
    assert clock.left == 100
    clock.step(50.0, 100.0)
    assert clock.left == 100


def test_results_know_their_sections() -> None:
    found = run(sample("socat", 1, out=1.0), sample("socat", 1, "interleaved", Case(flows=200), out=1.0))
    assert [section.name for section in found.sections()] == ["fan-out", "interleaved"]
    assert found.names("fan-out") == ["socat"]
    assert results.VERSION == 1
