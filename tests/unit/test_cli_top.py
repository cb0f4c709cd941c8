"""`mrelay top`: what its lines say, one frame, and the live view driven by keys."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from fake_relay import FakeRelay, Run
from mrelay.cli.client import Client
from mrelay.cli.top_app import RuleScreen, TopApp
from mrelay.cli.top_model import SPARK_WIDTH, Model, sparkline

FLOWS = "GET /v1/flows?limit=200"


def rule(name: str, pps: float, state: str = "up") -> dict[str, Any]:
    output = {"to": f"eth1:239.2.2.{len(name)}:6000", "state": state, "packets": 90, "bytes": 900, "errors": 3}
    return {
        "name": name,
        "state": state,
        "packets": 100,
        "bytes": 1000,
        "pps": pps,
        "bps": 800 * pps,
        "outputs": [output],
    }


def flow(port: int, pps: float, engine: str, *rules: str) -> dict[str, Any]:
    return {
        "interface": "eth0",
        "vlan": None,
        "source": "10.1.1.9",
        "group": "239.1.1.1",
        "port": port,
        "worker": 0,
        "engine": engine,
        "why": "",
        "packets": 100,
        "bytes": 1000,
        "pps": pps,
        "bps": 800 * pps,
        "rules": list(rules),
        "outputs": ["eth1:239.2.2.2:6000"],
    }


def stats(*rules: dict[str, Any], no_rule: int = 5) -> dict[str, Any]:
    drops = {"no_rule": no_rule, "loop": 0}
    counts: dict[str, Any] = {"received": 105, "matched": 100, "drops": drops, "carried": 50, "passed": {}}
    return {**counts, "rules": list(rules), "flows": 2, "engines": {"xdp": 0, "ebpf": 1, "uring": 1}}


@pytest.fixture
def busy(relay: FakeRelay) -> FakeRelay:
    """A relay with two rules and two flows."""
    relay.answer("GET /v1/health", {"pid": 7})
    relay.answer("GET /v1/stats", stats(rule("studio-a", 50), rule("b", 2000, "waiting: eth1 is down")))
    relay.answer(FLOWS, {"flows": [flow(5000, 2000, "ebpf", "b"), flow(5001, 50, "uring", "studio-a", "b")]})
    return relay


# ---- lines -----------------------------------------------------------------------------------------


def test_a_minute_as_a_line() -> None:
    assert sparkline([]) == " " * SPARK_WIDTH
    assert sparkline([0.0] * 60) == " " * SPARK_WIDTH
    assert sparkline([5.0] * 60) == "█" * SPARK_WIDTH
    assert sparkline([0.0] * 30 + [float(n) for n in range(30)]) == "      ▁▃▄▆▇█"


def test_one_frame_fits_a_terminal(run: Run, busy: FakeRelay) -> None:
    status, out, err = run("top", "--once")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "1 of 2 rules up   flows: 1 ebpf, 1 uring   2.05 kpackets/s   1.64 Mbit/s",
        "dropped 5 in all; now: nothing",
        "",
        "RULE      PACKETS/S      BITRATE  ENGINE      ERRORS  STATE",
        "b            2.00 k  1.60 Mbit/s  ebpf+uring       3  waiting: eth1 is down",
        "studio-a         50  40.0 kbit/s  uring            3  up",
    ]
    assert max(map(len, out.splitlines())) <= 80


def test_one_frame_of_flows_filtered_and_sorted(run: Run, busy: FakeRelay) -> None:
    lines = run("top", "--once", "--show", "flows", "--filter", "239.1.1.1 STUDIO").out.splitlines()
    assert [line.split()[2] for line in lines[4:]] == ["239.1.1.1:5001"]
    lines = run("top", "--once", "--sort", "name").out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["b", "studio-a"]
    lines = run("top", "--once", "--sort", "state").out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["b", "studio-a"], "what is not up comes first"
    assert run("top", "--once", "--filter", "nothing").out.endswith("No rules.\n")


def test_drops_that_rise_are_named() -> None:
    model = Model()
    model.take(stats(no_rule=5), [], 1)
    model.take(stats(no_rule=45), [], 2)
    assert model.summary()[1] == "dropped 45 in all; now: no_rule 20 /s"


def test_without_a_terminal_it_says_what_to_do(run: Run, busy: FakeRelay) -> None:
    status, _, err = run("top")
    assert (status, err) == (2, "mrelay: top needs a terminal: add --once for one frame\n")


# ---- the live view -----------------------------------------------------------------------------------


def drive(relay: FakeRelay, keys: Callable[["Pilot[None]", TopApp], Awaitable[None]]) -> TopApp:
    """The view in 80 columns, under these keys."""
    app = TopApp(Client(relay.path), Model(), "rules", "packets", "", 0.3)

    async def work() -> None:
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 2)
            await keys(pilot, app)

    asyncio.run(asyncio.wait_for(work(), 50))
    return app


async def until(pilot: "Pilot[None]", condition: Callable[[], bool]) -> None:
    while not condition():
        await pilot.pause(0.01)


def lines(app: TopApp, which: str = "#table") -> list[list[str]]:
    table = app.screen.query_one(which, DataTable)
    return [[str(cell) for cell in table.get_row_at(number)] for number in range(table.row_count)]


def said(app: TopApp, which: str) -> str:
    return str(app.screen.query_one(which, Static).content)


def test_keys(busy: FakeRelay) -> None:
    async def keys(pilot: "Pilot[None]", app: TopApp) -> None:
        assert [cells[0] for cells in lines(app)] == ["b", "studio-a"]
        assert lines(app)[1][3].endswith("█")
        await pilot.press("s", "s")
        assert "rules by name" in said(app, "#note")
        await pilot.press("slash", *"io", "enter")
        assert [cells[0] for cells in lines(app)] == ["studio-a"]
        await pilot.press("escape", "tab")
        assert [cells[0] for cells in lines(app)] == ["10.1.1.9 > 239.1.1.1:5000", "10.1.1.9 > 239.1.1.1:5001"]
        await pilot.press("tab", "down", "enter")
        await until(pilot, lambda: isinstance(app.screen, RuleScreen))
        assert said(app, "#rule").startswith("rule studio-a: up")
        assert lines(app, "#outputs") == [["eth1:239.2.2.8:6000", "90", "3", "up"]]
        assert [cells[0] for cells in lines(app, "#flows")] == ["10.1.1.9 > 239.1.1.1:5001"]
        await pilot.press("escape")
        assert not isinstance(app.screen, RuleScreen)
        await pilot.press("q")

    assert drive(busy, keys).return_code == 0


def test_a_flow_leads_to_its_rule(busy: FakeRelay) -> None:
    async def keys(pilot: "Pilot[None]", app: TopApp) -> None:
        await pilot.press("tab", "enter")
        await until(pilot, lambda: isinstance(app.screen, RuleScreen))
        assert said(app, "#rule").startswith("rule b: waiting: eth1 is down")
        busy.answer("GET /v1/stats", stats(rule("studio-a", 50)))
        await until(pilot, lambda: said(app, "#rule") == "rule b is gone")

    drive(busy, keys)


def test_a_relay_that_goes_and_another_that_comes(busy: FakeRelay) -> None:
    async def keys(pilot: "Pilot[None]", app: TopApp) -> None:
        os.rename(busy.path, busy.path.with_suffix(".away"))
        await until(pilot, lambda: "no relay at" in said(app, "#note"))
        assert len(lines(app)) == 2, "what was known last stays"
        busy.answer("GET /v1/health", {"pid": 8})
        busy.answer("GET /v1/stats", stats(rule("new", 1), no_rule=0))
        os.rename(busy.path.with_suffix(".away"), busy.path)
        await until(pilot, lambda: said(app, "#note") == "the relay was restarted: it is pid 8 now")
        await until(pilot, lambda: [cells[0] for cells in lines(app)] == ["new"])

    drive(busy, keys)
