"""The whole control process but its privileges: from Setup to Stop, its API on a real Unix socket."""

import asyncio
import logging
import os
import re
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest

from control_scene import CONFIG_A, RULE_A, RULE_B, VIEW_A, Scene, relay
from fake_roles import run, until
from mrelay import logs
from mrelay.control import page
from mrelay.control.state import NAME
from mrelay.counters import RATE_LIMITED, RULE_DROP_ROW
from mrelay.messages import OpenIngress, Reload, WorkerDown
from mrelay.model.ruleset import FlowKey
from mrelay.worker.flows import key_words


def test_it_starts_in_order(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            kinds = [said for said, _ in it.fake.events]
            assert kinds[0] == "start"
            assert kinds[-3:] == ["grant", "listen", "ready"]
            assert it.fake.said("listen") == [0o660]
            assert it.fake.said("ready") == ["1 of 1 rules up, 1 workers"]
            assert (await it.api("GET", "/v1/rules")).body == {"rules": [VIEW_A]}
            assert it.saved()["rules"] == [RULE_A] == it.saved()["file_rules"]

    run(work)


def test_health(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path) as it:
            health = (await it.api("GET", "/v1/health")).body
            assert health.pop("uptime") >= 0
            assert health.pop("version")
            assert health.pop("landlock") == 0
            engine = {"engine": "uring", "no_fast_path": 'engine = "uring"'}
            assert health == {"ready": True, "pid": os.getppid(), "egress": "io_uring", **engine}

    run(work)


@pytest.mark.parametrize(
    ("config", "workers", "said"),
    [
        ("[[rule]\n", "1", "relay.toml: this is not TOML"),
        (CONFIG_A + CONFIG_A, "1", "2 rules have this name"),
        ("[relay]\nworkers = [1023]\n", None, "choose from"),
        (CONFIG_A, "100000", "command line: key 'workers'"),
        (CONFIG_A, "some", "command line: key 'workers'"),
    ],
)
def test_a_config_that_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str, workers: str | None, said: str
) -> None:
    async def work() -> None:
        life = await Scene(tmp_path, config).start(workers=workers)
        assert await life == 78

    run(work)
    assert said in caplog.text


def test_every_issue_has_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        bad = '[[rule]]\nname = "x"\nfrom = "lo:nonsense"\nto = []\n[relay]\nflow_limt = 1\n'
        assert await (await Scene(tmp_path, bad).start()) == 78

    run(work)
    lines = [line for line in caplog.text.splitlines() if line.startswith("relay.toml: ")]
    assert len(lines) == 3


def test_without_its_supervisor_it_ends(tmp_path: Path) -> None:
    async def work() -> None:
        it = Scene(tmp_path)
        life = await it.start()
        await until(lambda: bool(it.fake.said("ready")))
        it.fake.hang_up()
        assert await life == 1

    run(work)


def test_a_bad_message_ends_it(tmp_path: Path) -> None:
    async def work() -> None:
        it = Scene(tmp_path)
        life = await it.start()
        it.fake.channel.sock.send(b'{"v": 2}')
        assert await life == 1

    run(work)


def test_rules_come_and_go(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path) as it:
            assert await it.api("POST", "/v1/rules", RULE_A) == (201, VIEW_A)
            assert it.saved()["rules"] == [RULE_A]
            assert len(it.fake.workers[0].rules) == 1
            status, body = await it.api("POST", "/v1/rules", RULE_B)
            assert status == 201
            assert body["state"] == "waiting: no interface eth9"
            assert [output["state"] for output in body["outputs"]] == ["up", "waiting: no interface eth9"]
            assert (await it.api("DELETE", "/v1/rules/a")).status == 204
            assert await it.names() == ["b"] == [rule["name"] for rule in it.saved()["rules"]]

    run(work)


def test_apply(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            new = {"rules": [{**RULE_A, "to": ["lo:239.2.2.3:6000"]}, RULE_B]}
            said = {"added": ["b"], "removed": [], "changed": ["a"], "unchanged": []}
            assert await it.api("PUT", "/v1/rules?dry_run=true", new) == (200, said)
            assert await it.names() == ["a"]
            assert await it.api("PUT", "/v1/rules", new) == (200, said)
            assert await it.names() == ["a", "b"]
            assert it.saved()["file_rules"] == [RULE_A]

    run(work)


REFUSED = [
    ("POST", "/v1/rules", RULE_A, 409, "name"),
    ("POST", "/v1/rules", {**RULE_A, "name": "x y"}, 422, "name"),
    ("POST", "/v1/rules", {**RULE_A, "name": "x", "frm": 1}, 422, "frm"),
    ("POST", "/v1/rules", {**RULE_A, "name": "x", "from": "\ud800"}, 422, "from"),
    ("POST", "/v1/rules", {"name": "x", "from": "lo:239.2.2.2:6000", "to": ["lo:239.1.1.1:5000"]}, 422, "to"),
    ("POST", "/v1/rules", [], 422, ""),
    ("POST", "/v1/rules", None, 422, ""),
    ("PUT", "/v1/rules", {"rules": [RULE_A, RULE_A]}, 422, "name"),
    ("PUT", "/v1/rules", {"rules": RULE_A}, 422, "rules"),
    ("PUT", "/v1/rules", {"rule": []}, 422, "rules"),
    ("PUT", "/v1/rules?dry_run=perhaps", {"rules": []}, 422, "dry_run"),
    ("DELETE", "/v1/rules/none", None, 404, "name"),
    ("DELETE", "/v1/rules/" + urllib.parse.quote(b"\xff"), None, 404, "name"),
    ("GET", "/v1/nothing", None, 404, ""),
    ("DELETE", "/v1/rules", None, 405, ""),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "key"), REFUSED)
def test_what_is_refused_says_why_and_changes_nothing(
    tmp_path: Path, method: str, path: str, body: object, status: int, key: str
) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            answer = await it.api(method, path, body)
            assert answer.status == status
            for error in answer.body["errors"]:
                assert error.keys() == {"rule", "key", "problem", "remedy"}
                assert error["problem"] and error["remedy"]
            assert key in {error["key"] for error in answer.body["errors"]}
            assert (await it.api("GET", "/v1/rules")).body == {"rules": [VIEW_A]}

    run(work)


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 100_000, b"1" * 10_000, b'{"name": NaN}'])
def test_bodies_that_are_no_json(tmp_path: Path, data: bytes) -> None:
    async def work() -> None:
        async with relay(tmp_path) as it:
            status, body = await asyncio.to_thread(it.api.ask, "POST", "/v1/rules", data)
            assert status in (400, 422)
            assert body["errors"]

    run(work)


def test_a_rule_is_replaced(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            other = RULE_A | {"to": ["lo:239.2.2.3:6000"]}
            status, body = await it.api("PUT", "/v1/rules/a", other)
            assert (status, body["to"], body["state"]) == (200, ["lo:239.2.2.3:6000"], "up")
            assert it.saved()["rules"] == [other]
            for name, rule, refused in (("a", RULE_B, 422), ("b", RULE_B, 404), ("a", {**RULE_A, "to": []}, 422)):
                status, body = await it.api("PUT", f"/v1/rules/{name}", rule)
                assert status == refused and body["errors"][0]["remedy"]
            assert it.saved()["rules"] == [other]

    run(work)


def test_history(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            found = (await it.api("GET", "/v1/rules/a/history")).body
            assert found.keys() == {"step", "end", "pps", "bps", "errors"}
            assert (await it.api("GET", "/v1/rules/b/history")).status == 404
            assert (await it.api("GET", "/v1/history")).body["drops"] == {}

    run(work)


def test_the_page(tmp_path: Path) -> None:
    """Every file that its index and modules name is there, and nothing is asked of another host."""

    async def work() -> None:
        async with relay(tmp_path) as it:
            index = (await it.api("GET", "/")).body
            modules = set(re.findall(r'(?:src|href)="page/([^"]+)"', index))
            assert "app.js" in modules
            for name in (todo := list(modules)):
                status, text = await it.api("GET", f"/page/{name}")
                assert status == 200, name
                todo += [found for found in re.findall(r'from "\./([^"]+)"', text) if found not in todo]
                assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
            assert set(todo) == page.FILES.keys() - {page.INDEX}, "no file is left over"
            for path in ("/page/none.js", "/page/__init__.py", "/page/..%2Fapi.py"):
                assert (await it.api("GET", path)).status == 404

    run(work)


def test_the_busiest_flows(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            (worker,) = it.fake.workers
            for slot in range(4):
                worker.counters.keys[:, slot] = key_words(FlowKey(1, 0, 4, slot + 1, 0xEF010101, 5000))
                worker.counters.flows[:, slot] = 7, 700
            assert len((await it.api("GET", "/v1/flows")).body["flows"]) == 4
            assert len((await it.api("GET", "/v1/flows?limit=3")).body["flows"]) == 3
            assert (await it.api("GET", "/v1/flows?limit=0")).status == 422

    run(work)


def test_numbers(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            (worker,) = it.fake.workers
            counters = worker.counters
            worker.count(7)
            counters.totals[0] += 3
            counters.totals[2] += 5
            counters.drops[0] += 3
            counters.rules[:2, 0] = 7, 700
            counters.rules[RULE_DROP_ROW[RATE_LIMITED], 0] = 2
            counters.links[:, 0] = 6, 600, 1
            group, source = 0xEF010101, 0x0A000002
            counters.keys[:, 5] = key_words(FlowKey(1, 0, 4, source, group, 5000))
            counters.flows[:, 5] = 7, 700
            before = time.time()
            stats = (await it.api("GET", "/v1/stats")).body
            assert before <= stats["time"] <= time.time()
            assert (stats["received"], stats["matched"], stats["drops"]["no_rule"]) == (10, 7, 3)
            assert (stats["flows"], stats["engines"]) == (1, {"xdp": 0, "ebpf": 0, "uring": 1})
            assert (stats["carried"], stats["passed"]) == (5, {})
            (rule,) = stats["rules"]
            assert (rule["name"], rule["packets"], rule["bytes"]) == ("a", 7, 700)
            assert rule["drops"] == {"rate_limited": 2}
            output = {"to": "lo:239.2.2.2:6000", "state": "up", "packets": 6, "bytes": 600, "errors": 1}
            assert rule["outputs"] == [output]
            (flow,) = (await it.api("GET", "/v1/flows")).body["flows"]
            assert (flow["source"], flow["group"], flow["port"]) == ("10.0.0.2", "239.1.1.1", 5000)
            assert (flow["interface"], flow["vlan"], flow["packets"]) == ("lo", None, 7)
            assert (flow["rules"], flow["outputs"]) == (["a"], ["lo:239.2.2.2:6000"])
            text = (await it.api("GET", "/metrics")).body
            assert 'mrelay_dropped_datagrams_total{reason="no_rule"} 3' in text
            assert 'mrelay_output_errors_total{rule="a",output="lo:239.2.2.2:6000"} 1' in text
            assert 'mrelay_rule_up{rule="a"} 1' in text
            assert "mrelay_carried_datagrams_total 5" in text
            assert 'mrelay_flows{engine="uring"} 1' in text
            assert 'mrelay_events_total{type="rule_up"} 1' in text
            for process in ("supervisor", "control", "worker-0"):
                assert f'mrelay_process_cpu_seconds_total{{process="{process}"}}' in text
                assert f'mrelay_process_resident_memory_bytes{{process="{process}"}}' in text

    run(work)


def test_workers(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path) as it:
            (worker,) = (await it.api("GET", "/v1/workers")).body["workers"]
            assert worker.pop("cpu_percent") >= 0
            expected = {
                "worker": 0,
                "core": 0,
                "pid": os.getpid(),
                "state": "running",
                "restarts": 0,
                "repairs": 0,
            }
            assert worker == {**expected, "egress": "io_uring", "flows": 0, "received": 0, "carried": 0}
            it.fake.channel.send(WorkerDown(0, 1, "signal SIGKILL", "", 0.0))
            while True:
                (worker,) = (await it.api("GET", "/v1/workers")).body["workers"]
                if worker["state"] == "restarting":
                    break
            assert (worker["pid"], worker["restarts"]) == (None, 1)

    run(work)


def test_the_document_describes_the_answers(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path) as it:
            document = (await it.api("GET", "/openapi.json")).body
            paths = ["/v1/health", "/v1/rules", "/v1/flows", "/v1/stats", "/v1/reasons", "/v1/workers"]
            assert set(document["paths"]) >= set(paths)
            for path in paths:
                answer = (await it.api("GET", path)).body
                schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
                name = schema["schema"]["$ref"].rpartition("/")[2]
                assert answer.keys() == document["components"]["schemas"][name]["properties"].keys()
            body = document["paths"]["/v1/rules"]["post"]["requestBody"]["content"]["application/json"]
            assert body["schema"]["required"] == ["name", "from", "to"]

    run(work)


def test_changes_outlive_a_restart_and_edits_win(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            await it.api("POST", "/v1/rules", RULE_B)
        async with relay(tmp_path, CONFIG_A) as it:
            assert await it.names() == ["a", "b"]
            await it.api("DELETE", "/v1/rules/a")
        async with relay(tmp_path, CONFIG_A) as it:
            assert await it.names() == ["b"]
        async with relay(tmp_path, CONFIG_A.replace("5000", "5005")) as it:
            assert await it.names() == ["b", "a"]

    run(work)


def test_reload(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            await it.api("POST", "/v1/rules", RULE_B)
            it.reload("nonsense")
            await until(lambda: "nothing changed" in caplog.text)
            assert await it.names() == ["a", "b"]
            it.reload("")
            await it.until_names("b")
            it.fake.channel.send(Reload("can't open relay.toml: No such file or directory"))
            await until(lambda: "can't open relay.toml" in caplog.text)
            assert await it.names() == ["b"]

    run(work)


def test_log_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrelay.logs._settings", logs._Settings())
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", root.level)

    async def work() -> None:
        async with relay(tmp_path) as it:
            assert (await it.api("GET", "/v1/log")).body == dict.fromkeys(logs.ROLES, "info")
            changed = {"supervisor": "info", "control": "error", "worker": "debug"}
            answer = await it.api("PATCH", "/v1/log", {"worker": "debug", "control": "error"})
            assert answer == (200, changed)
            assert root.level == logging.ERROR
            await until(lambda: len(it.fake.said("level")) == 2)
            assert it.fake.said("level") == [("worker", "debug"), ("control", "error")]
            for bad in ({}, {"cook": "info"}, {"worker": "loud"}, {"worker": ["info"]}, {"control": 10}):
                assert (await it.api("PATCH", "/v1/log", bad)).status == 422
            assert (await it.api("GET", "/v1/log")).body == changed
            assert len(it.fake.said("level")) == 2

    run(work)


def test_status_follows_the_rules(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            await it.api("POST", "/v1/rules", RULE_B)
            await until(lambda: it.fake.said("status") == ["1 of 2 rules up, 1 workers"])
            it.reload("")
            await until(lambda: len(it.fake.said("ready")) == 2)

    run(work)


def test_a_restarted_control_goes_on(tmp_path: Path) -> None:
    """It keeps what is open and where the rules count, and does without a config that went bad."""

    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            held = tuple(it.fake.held)
            await it.api("POST", "/v1/rules", RULE_B)
            await it.api("DELETE", "/v1/rules/b")
            await it.api("POST", "/v1/rules", RULE_B)
            slots = it.saved()["slots"]
            assert any(isinstance(what, OpenIngress) for what in held)
        async with relay(tmp_path, "nonsense", restarted=True, held=held) as it:
            assert await it.names() == ["a", "b"]
            assert it.saved()["slots"] == slots
            assert not set(it.fake.said("grant")) & set(held)
            assert it.fake.said("release") == []

    run(work)


def test_a_fresh_start_counts_from_the_first_slot(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path) as it:
            await it.api("POST", "/v1/rules", RULE_B)
            await it.api("DELETE", "/v1/rules/b")
            await it.api("POST", "/v1/rules", RULE_A)
        async with relay(tmp_path) as it:
            assert [slot for _, slot, *_ in it.saved()["slots"]["rules"]] == [0]

    run(work)


def test_a_corrupt_state_is_kept_and_the_file_runs(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{")

    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            assert await it.names() == ["a"]

    run(work)
    assert [path.read_text() for path in tmp_path.glob("*.corrupt-*")] == ["{"]


def import_nothing_late() -> None:
    """Run in a process of its own: use all of the API, and fail if that imported anything."""
    directory = Path(sys.argv[1])

    async def work() -> None:
        known: set[str] = set()
        async with relay(directory, CONFIG_A) as it:
            for path in (
                "health",
                "rules",
                "flows",
                "stats",
                "workers",
                "rules/a/why?seconds=0.5",
                "why?seconds=0.5",
            ):
                await it.api("GET", f"/v1/{path}")
            for path in ("/metrics", "/openapi.json", "/nothing"):
                await it.api("GET", path)
            await it.api("POST", "/v1/rules", RULE_B)
            await it.api("PUT", "/v1/rules", {"rules": [1, {"name": "x"}]})
            await it.api("DELETE", "/v1/rules/b")
            await asyncio.to_thread(it.api.ask, "POST", "/v1/rules", b"{")
            known |= sys.modules.keys()
        late = known - BEFORE
        assert not late, f"imported late: {sorted(late)}"

    run(work)


BEFORE = frozenset(sys.modules)


def test_nothing_is_imported_late(tmp_path: Path) -> None:
    """An unprivileged user may not be able to read what is imported after the drop."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    code = "import test_control_main as t; t.import_nothing_late()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_events_of_rules_and_workers(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            await it.api("POST", "/v1/rules", RULE_B)
            it.fake.channel.send(WorkerDown(0, 1, "signal 9", "", 0.0))
            await until_events(it, 8)
            page = (await it.api("GET", "/v1/events")).body
            assert [(event["type"], event.get("rule")) for event in page["events"]] == [
                ("control_started", None),
                ("rule_added", "a"),
                ("worker_started", None),
                ("rule_up", "a"),
                ("rule_added", "b"),
                ("rule_waiting", "b"),
                ("output_state", "b"),
                ("output_state", "b"),
                ("worker_died", None),
            ]
            assert page["events"][5]["reason"] == "waiting: no interface eth9"
            later = (await it.api("GET", f"/v1/events?since={page['run']}:7")).body
            assert [event["id"] for event in later["events"]] == [8, 9]
            wrong = await it.api("GET", "/v1/events?since=yesterday")
            assert wrong.status == 422
            assert wrong.body["errors"][0]["problem"] == "'yesterday' is no event's id"

    run(work)


async def until_events(it: Scene, count: int) -> None:
    while (await it.api("GET", "/v1/events")).body["last"] <= count:
        await asyncio.sleep(0)


def test_a_control_that_takes_over_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A):
            pass
        async with relay(tmp_path, CONFIG_A, restarted=True) as it:
            events = (await it.api("GET", "/v1/events?since=0a0b0c0d:3")).body
            assert events["restarted"]
            assert [event["type"] for event in events["events"]] == ["control_started", "rule_up"]
            assert events["events"][0]["took_over"]

    run(work)


def test_an_event_stream_follows_and_ends_with_the_relay(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "sock"))
            writer.write(b"GET /v1/events/stream HTTP/1.1\r\nhost: relay\r\nlast-event-id: 1\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"text/event-stream" in head
            await reader.readuntil(b"event: rule_up\n")
            await it.api("DELETE", "/v1/rules/a")
            await reader.readuntil(b"event: rule_removed\n")
        assert b"event:" not in await asyncio.wait_for(reader.read(), 5)  # at once, or `relay` would have waited
        writer.close()

    run(work)
