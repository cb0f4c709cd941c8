"""The event log, its places, and the stream of it: no relay."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from fake_roles import run
from mrelay.control import eventstream
from mrelay.control.events import BULK, KEPT, KINDS, Alarm, Cursor, Event, EventLog, Flow, RuleAdded, RuleUp
from mrelay.control.eventstream import EventStream

ROOT = Path(__file__).resolve().parents[2]


def a_log(count: int) -> EventLog:
    log = EventLog(lambda: 1000.5)
    for number in range(count):
        log.add(RuleAdded(rule=f"r{number + 1}"))
    return log


def ids(log: EventLog, after: Cursor | None = None, most: int = KEPT) -> list[int]:
    return [event.id for event in log.page(after, most).events]


def test_an_event_has_an_id_a_time_and_words() -> None:
    log = a_log(1)
    assert json.loads(log.page().model_dump_json())["events"] == [
        {"id": 1, "time": 1000.5, "type": "rule_added", "text": "rule 'r1' was added", "rule": "r1"}
    ]


def test_an_alarm_says_what_is_beyond_what() -> None:
    flow = Flow(interface="eth0", vlan=7, source="10.1.1.1", group="239.1.1.1", port=5000)
    alarm = Alarm(rule="a", name="loss", flow=flow, value=2.5, threshold=1, raised=True)
    flow_text = "flow eth0 vlan 7 10.1.1.1 -> 239.1.1.1 port 5000"
    assert alarm.say() == f"rule 'a', alarm loss of {flow_text} raised: 2.5, threshold 1"


def test_every_kind_says_something_of_its_own() -> None:
    kinds = [kind for kind in Event.__subclasses__() if kind.__module__ == Event.__module__]
    assert sorted(kind.model_fields["type"].default for kind in kinds) == sorted(KINDS)
    assert all("say" in vars(kind) for kind in kinds)


def test_a_place_is_after_an_event() -> None:
    log = a_log(5)
    assert ids(log) == [1, 2, 3, 4, 5]
    assert ids(log, Cursor("", 3)) == ids(log, Cursor(log.run, 3)) == [4, 5]
    assert ids(log, Cursor("", 0), most=2) == [1, 2]
    assert ids(log, Cursor("", 5)) == []


def test_what_is_no_longer_kept_was_missed() -> None:
    log = a_log(KEPT + 10)
    page = log.page(Cursor("", 4))
    assert (page.missed, page.events[0].id, page.last, page.restarted) == (6, 11, KEPT + 10, False)
    assert log.page(Cursor("", 10)).missed == 0


@pytest.mark.parametrize("place", [Cursor("00000000", 2), Cursor("", 99)])
def test_a_place_in_another_run_is_before_all_of_this_one(place: Cursor) -> None:
    log = a_log(3)
    page = log.page(place)
    assert page.restarted
    assert [event.id for event in page.events] == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "12345678:", ":3", "ABCDEF01:3", "1" * 16, "5\n"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(ValueError, match="no event's id"):
        Cursor.parse(text)


def test_a_place_as_text() -> None:
    assert Cursor.parse("42") == Cursor("", 42)
    assert Cursor.parse(str(Cursor("0a1b2c3d", 7))) == Cursor("0a1b2c3d", 7)


def test_much_at_once_is_told_as_a_number() -> None:
    log = a_log(0)
    log.add_many([*[(RuleAdded, {"rule": "r"})] * (BULK + 7), (RuleUp, {"rule": "r"})])
    *_, added, up = log.page().events
    assert (added.text, up.text) == ("7 more of rule_added", "1 more of rule_up")
    assert log.last == BULK + 2
    assert log.counts == {"rule_added": BULK + 7, "rule_up": 1, "omitted": 2}


class Client:
    """An ASGI client of a stream: keeps what it is sent, and takes nothing while `stuck`."""

    def __init__(self, log: EventLog, after: Cursor | None = None) -> None:
        self.sent: list[Any] = []
        self.stuck, self.aborted = asyncio.Event(), False
        self.stuck.set()
        self._leaving = asyncio.Event()
        stream = EventStream(log, after, self._abort, Response(status_code=503))
        self.life = asyncio.create_task(stream({"type": "http"}, self._receive, self._send))

    def _abort(self) -> None:
        self.aborted = True

    async def _receive(self) -> Any:
        await self._leaving.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.stuck.wait()
        self.sent.append(message)

    async def leave(self) -> None:
        self._leaving.set()
        await self.life

    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def until(self, text: str) -> None:
        while text not in self.text():
            await asyncio.sleep(0)


def test_the_stream_goes_on_where_it_was() -> None:
    async def work() -> None:
        log = a_log(3)
        client = Client(log, Cursor(log.run, 1))
        await client.until(f"id: {log.run}:3\nevent: rule_added\ndata: {{")
        hello = json.loads(client.text().split("data: ")[1].split("\n")[0])
        assert hello == {"run": log.run, "last": 3, "missed": 0, "restarted": False}
        assert f"retry: 1000\nid: {log.run}:1\nevent: hello\n" in client.text()
        log.add(RuleUp(rule="new"))
        await client.until("event: rule_up\n")
        assert client.text().count("event: ") == 4
        assert log.followers == 1
        await client.leave()
        assert log.followers == 0

    run(work)


def test_the_stream_begins_with_now_and_ends_with_the_log() -> None:
    async def work() -> None:
        log = a_log(3)
        client = Client(log)
        await client.until("event: hello")
        log.close()
        await client.life
        assert "rule_added" not in client.text()
        assert client.sent[-1] == {"type": "http.response.body", "body": b""}

    run(work)


def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr(eventstream, "KEEP_ALIVE", 0.001)
        client = Client(a_log(0))
        await client.until(": keep-alive\n\n: keep-alive\n\n")
        await client.leave()

    run(work)


def test_a_client_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr(eventstream, "PATIENCE", 0.01)
        log = a_log(1)
        client = Client(log)
        await client.until("event: hello")
        client.stuck.clear()
        log.add(RuleUp(rule="new"))
        await client.life
        assert client.aborted
        assert log.followers == 0

    run(work)


def test_a_client_that_falls_behind_is_dropped() -> None:
    async def work() -> None:
        log = a_log(1)
        client = Client(log)
        await client.until("event: hello")
        client.stuck.clear()
        log.add(RuleUp(rule="new"))
        await asyncio.sleep(0.001)
        log.add_many([(RuleUp, {"rule": "new"})] * (KEPT + 5), most=KEPT + 5)
        client.stuck.set()
        await client.life
        assert client.aborted

    run(work)


def test_one_client_too_many_is_refused() -> None:
    async def work() -> None:
        log = a_log(1)
        clients = [Client(log) for _ in range(eventstream.MOST)]
        for client in clients:
            await client.until("event: hello")
        late = Client(log)
        await late.life
        assert late.sent[0]["status"] == 503
        assert log.followers == eventstream.MOST
        for client in clients:
            await client.leave()

    run(work)


def test_the_page_in_docs_names_every_kind_and_its_fields() -> None:
    rows = [line for line in (ROOT / "docs" / "events.md").read_text().splitlines() if line.startswith("| `")]
    said = {
        kind: set(re.findall(r"`(\w+)`", fields))
        for kinds, fields in (row.split("|")[1:3] for row in rows)
        for kind in re.findall(r"`(\w+)`", kinds)
    }
    known = {kind.model_fields["type"].default: kind.model_fields.keys() for kind in Event.__subclasses__()}
    assert said == {kind: known[kind] - Event.model_fields.keys() for kind in KINDS}
