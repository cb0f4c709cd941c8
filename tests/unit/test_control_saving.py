"""A change beside the disk: what waits for it, and what comes of a change that can't be saved."""

import asyncio
import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from control_scene import CONFIG_A, RULE_A, RULE_B, VIEW_A, relay
from fake_roles import run, until
from mrelay.control.state import State, StateFile
from mrelay.messages import JoinGroup


def test_a_change_that_cannot_be_saved_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a moment: what runs would stop for a change that is then refused."""

    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            seen: list[object] = []

            def full(*_: object) -> None:
                seen.append(it.api.ask("GET", "/v1/rules", None).body)
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(StateFile, "save", full)
            commits = it.fake.said("commit")
            for method, path, what in (
                ("PUT", "/v1/rules/a", RULE_A | {"to": ["lo:239.2.2.3:6000"]}),
                ("PUT", "/v1/rules", {"rules": [RULE_B]}),
                ("DELETE", "/v1/rules/a", None),
            ):
                status, body = await it.api(method, path, what)
                assert status == 507
                assert "No space left" in body["errors"][0]["problem"]
            assert seen == [{"rules": [VIEW_A]}] * 3
            assert (await it.api("GET", "/v1/rules")).body == {"rules": [VIEW_A]}
            assert it.fake.said("commit") == commits

    run(work)


def slow_disk(
    monkeypatch: pytest.MonkeyPatch, error: OSError | None = None
) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Whether StateFile.save waits, and what ends its waiting; then it fails if there is an error."""
    save, began, go_on = StateFile.save, threading.Event(), threading.Event()

    def wait_and_save(file: StateFile, state: State) -> None:
        began.set()
        assert go_on.wait(20)
        if error is not None:
            raise error
        save(file, state)

    monkeypatch.setattr(StateFile, "save", wait_and_save)
    return began.is_set, go_on.set


def test_a_rule_that_is_added_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in force, its group joined, before it is saved; answered when it is on disk."""

    async def work() -> None:
        async with relay(tmp_path) as it:
            saving, go_on = slow_disk(monkeypatch)
            adding = asyncio.create_task(it.api("POST", "/v1/rules", RULE_A))
            await until(saving)
            assert any(isinstance(what, JoinGroup) for what in it.fake.held)
            assert len(it.fake.workers[0].rules) == 1
            assert it.saved()["rules"] == []
            assert not adding.done()
            go_on()
            assert (await adding).status == 201
            assert it.saved()["rules"] == [RULE_A]

    run(work)


@pytest.mark.parametrize(
    ("method", "path", "what", "rules"),
    [
        ("POST", "/v1/rules", RULE_B, ["a", "b"]),
        ("PUT", "/v1/rules", {"rules": [RULE_B]}, ["b"]),
        ("DELETE", "/v1/rules/a", None, []),
    ],
)
def test_who_hangs_up_stops_no_change(
    method: str,
    path: str,
    what: object,
    rules: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is made as a whole, in force and on disk: else who asks again would find it half done."""

    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            saving, go_on = slow_disk(monkeypatch)
            sent = it.api.send(method, path, None if what is None else json.dumps(what).encode())
            await until(saving)
            sent.close()
            await it.api("GET", "/v1/stats")  # by now the server has seen it go
            go_on()
            await until(lambda: [rule["name"] for rule in it.saved()["rules"]] == rules)
            while await it.names() != rules:  # in force a moment after it is on disk, or never: then `run` ends it
                pass

    run(work)


def test_a_rule_that_was_added_and_cannot_be_saved_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with relay(tmp_path, CONFIG_A) as it:
            held, worker = set(it.fake.held), it.fake.workers[0]
            _, go_on = slow_disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
            adding = asyncio.create_task(it.api("POST", "/v1/rules", RULE_B))
            await until(lambda: len(worker.rules) == 2)
            go_on()
            assert (await adding).status == 507
            assert (len(worker.rules), it.fake.held) == (1, held)
            assert await it.names() == ["a"] == [rule["name"] for rule in it.saved()["rules"]]

    run(work)
