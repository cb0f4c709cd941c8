"""The commands that talk to a relay: what they ask, what they print, how they fail."""

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_relay import FakeRelay, Run
from mrelay import reasons

RULE_A = {
    "name": "studio-a",
    "from": "eth0:239.1.1.1:5000",
    "to": ["eth1:239.2.2.2:6000", "wg0:[fd00::2]:6000,ttl=8"],
    "link_local": False,
    "allow_loop": True,
    "state": "up",
    "outputs": [
        {"to": "eth1:239.2.2.2:6000", "state": "up"},
        {"to": "wg0:[fd00::2]:6000,ttl=8", "state": "waiting: no interface wg0"},
    ],
}
RULE_B = {
    "name": "b",
    "from": "eth0:239.1.1.2:5000",
    "to": ["eth1:239.2.2.3:6000"],
    "link_local": False,
    "allow_loop": False,
    "state": "waiting: no interface eth0",
    "outputs": [{"to": "eth1:239.2.2.3:6000", "state": "up"}],
}
FLOW = {
    "interface": "eth0",
    "vlan": None,
    "source": "10.1.1.9",
    "group": "239.1.1.1",
    "port": 5000,
    "worker": 0,
    "engine": "uring",
    "why": "of several rules, some have a rate",
    "packets": 1234567,
    "bytes": 1234567000,
    "pps": 62_000.0,
    "bps": 496_000_000.0,
    "rules": ["studio-a"],
    "outputs": ["eth1:239.2.2.2:6000", "wg0:[fd00::2]:6000,ttl=8"],
    "health": "rtp: loss 2.5%",
}
STATS = {
    "received": 1500,
    "matched": 1200,
    "drops": {"no_rule": 299, "loop": 1, "fragment": 0},
    "rules": [
        {
            "name": "studio-a",
            "packets": 1200,
            "bytes": 1_200_000,
            "pps": 3.5,
            "bps": 28_000.0,
            "outputs": [
                {"to": "eth1:239.2.2.2:6000", "state": "up", "packets": 1198, "bytes": 1_198_000, "errors": 2}
            ],
        }
    ],
    "flows": 1,
    "engines": {"ebpf": 1, "uring": 0},
    "carried": 1000,
    "passed": {"no_flow": 12, "shape": 0, "waiting": 3},
}
WORKER = {
    "worker": 0,
    "core": 1,
    "pid": None,
    "state": "restarting",
    "restarts": 3,
    "repairs": 0,
    "egress": "io_uring",
    "flows": 7,
    "received": 1_000_000,
    "carried": 900_000,
    "cpu_percent": 41.7,
}


# ---- reading -----------------------------------------------------------------------------------


def test_flows_are_a_table_with_human_numbers(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", {"flows": [FLOW]})
    status, out, err = run("flows")
    assert (status, err) == (0, "")
    header, first, second = (line.split() for line in out.splitlines())
    assert header[:5] == ["INTERFACE", "VLAN", "SOURCE", "GROUP", "PORT"]
    assert first[:6] == ["eth0", "-", "10.1.1.9", "239.1.1.1", "5000", "studio-a"]
    assert "1,234,567" in first
    assert " ".join(first).count("62.0 k") == 1
    assert "496 Mbit/s" in " ".join(first)
    assert second == ["wg0:[fd00::2]:6000,ttl=8"]


def test_the_busiest_flow_comes_first(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", {"flows": [FLOW, FLOW | {"source": "10.9.9.9", "pps": 1e6}]})
    out = run("flows").out
    assert out.index("10.9.9.9") < out.index("10.1.1.9")


def test_no_flows_says_where_to_look_next(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", {"flows": []})
    assert "mrelay rule list" in run("flows").out


@pytest.mark.parametrize(
    ("command", "target", "body"),
    [
        (["flows"], "/v1/flows", {"flows": [FLOW]}),
        (["stats"], "/v1/stats", STATS),
        (["workers"], "/v1/workers", {"workers": [WORKER]}),
        (["rule", "list"], "/v1/rules", {"rules": [RULE_A]}),
    ],
)
def test_json_is_the_relays_own_object(
    run: Run, relay: FakeRelay, command: list[str], target: str, body: dict[str, Any]
) -> None:
    relay.answer(f"GET {target}", body)
    status, out, err = run(*command, "--json")
    assert (status, json.loads(out), err) == (0, body, "")


def test_stats_add_up_and_hide_reasons_that_never_happened(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/stats", STATS)
    out = run("stats").out
    assert "received 1,500 = matched 1,200 + dropped 300; 1 flow" in out
    assert "the kernel carried 1,000, the slow path 500; frames it passed on: no_flow 12, waiting 3\n" in out
    assert "1.20 MB" in out
    assert "no_rule" in out
    assert reasons.DROPS["no_rule"][:30] in out
    assert "fragment" not in out


def test_stats_without_a_fast_path_are_silent_about_it(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/stats", STATS | {"carried": 0, "passed": {}})
    assert "kernel" not in run("stats").out


def test_workers(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/workers", {"workers": [WORKER]})
    row = run("workers").out.splitlines()[1].split()
    assert row == ["0", "1", "-", "restarting", "3", "0", "io_uring", "7", "1,000,000", "900,000", "42", "%"]


def test_rule_list_shows_the_state_of_rules_and_outputs(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/rules", {"rules": [RULE_A, RULE_B]})
    lines = [" ".join(line.split()) for line in run("rule", "list").out.splitlines()]
    assert lines == [
        "RULE FROM TO STATE",
        "studio-a eth0:239.1.1.1:5000 up",
        "eth1:239.2.2.2:6000 up",
        "wg0:[fd00::2]:6000,ttl=8 waiting: no interface wg0",
        "b eth0:239.1.1.2:5000 eth1:239.2.2.3:6000 waiting: no interface eth0",
    ]


# ---- changing ----------------------------------------------------------------------------------


def test_rule_add_posts_the_rule(run: Run, relay: FakeRelay) -> None:
    relay.answer("POST /v1/rules", RULE_B, 201)
    outputs = ["eth1:239.2.2.3:6000", "eth2:*:*"]
    status, out, _ = run(
        "rule", "add", "b", "--from", "eth0:239.1.1.2:5000", "--to", outputs[0], "--to", outputs[1]
    )
    assert (status, out) == (0, "added b: waiting: no interface eth0\n")
    body = {"name": "b", "from": "eth0:239.1.1.2:5000", "to": outputs}
    assert relay.requests == [("POST", "/v1/rules", body)]


def test_rule_add_can_allow_what_is_refused_by_default(run: Run, relay: FakeRelay) -> None:
    relay.answer("POST /v1/rules", RULE_A, 201)
    result = run("rule", "add", "a", "--from", "x", "--to", "y", "--link-local", "--allow-loop", "--json")
    assert json.loads(result.out) == RULE_A
    assert relay.requests[0][2] == {
        "name": "a",
        "from": "x",
        "to": ["y"],
        "link_local": True,
        "allow_loop": True,
    }


def test_every_error_of_the_relay_is_a_line(run: Run, relay: FakeRelay) -> None:
    relay.refuse(
        "POST /v1/rules",
        422,
        {"rule": "a", "key": "from", "problem": "no port", "remedy": "add one"},
        {"rule": "rule 2", "key": "to[0]", "problem": "odd", "remedy": ""},
        {"rule": "", "key": "", "problem": "too many rules", "remedy": "remove some"},
    )
    status, out, err = run("rule", "add", "a", "--from", "eth0:239.1.1.1", "--to", "y")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "mrelay: rule 'a', key 'from': no port — add one",
        "mrelay: rule 2, key 'to[0]': odd",
        "mrelay: too many rules — remove some",
    ]


def test_rule_remove(run: Run, relay: FakeRelay) -> None:
    relay.answer("DELETE /v1/rules/studio-a", None, 204)
    assert run("rule", "remove", "studio-a") == (0, "removed studio-a\n", "")


def test_removing_a_rule_that_is_not_there_fails(run: Run, relay: FakeRelay) -> None:
    error = {"rule": "a/b", "key": "", "problem": "no such rule", "remedy": "see 'mrelay rule list'"}
    relay.refuse("DELETE /v1/rules/a%2Fb", 404, error)
    status, _, err = run("rule", "remove", "a/b")
    assert (status, err) == (1, "mrelay: rule 'a/b': no such rule — see 'mrelay rule list'\n")


# ---- failing -----------------------------------------------------------------------------------


def test_no_socket_names_the_ways_out(run: Run, tmp_path: Path) -> None:
    status, out, err = run("flows", "--socket", str(tmp_path / "none.sock"))
    assert (status, out) == (1, "")
    assert err == (
        f"mrelay: no relay at {tmp_path}/none.sock: start one with 'mrelay run', or name its socket with "
        "--socket or MRELAY_SOCKET\n"
    )


def test_a_socket_left_behind(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    status, _, err = run("stats", "--socket", str(path))
    assert status == 1
    assert f"no relay answers at {path}" in err


def test_permission_denied_names_the_group(run: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root is refused nothing, so the refusal itself is put in; the group is read from the real socket."""

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mrelay.cli.client._UnixConnection.connect", refused)
    relay.path.chmod(0o660)
    monkeypatch.setattr("grp.getgrgid", lambda _: type("Group", (), {"gr_name": "media"}))
    info = os.stat_result((0o140660, 0, 0, 1, 0, 4242, 0, 0, 0, 0))
    monkeypatch.setattr(type(relay.path), "stat", lambda *_, **__: info)
    status, _, err = run("flows")
    assert status == 77
    assert "it is for group media; join it (sudo usermod -aG media $USER" in err


def test_an_answer_that_is_not_the_apis_is_shown_as_it_is(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", b"Internal Server Error", 500)
    assert run("flows") == (1, "", "mrelay: the relay answered 500: Internal Server Error\n")


def test_an_answer_that_is_not_json(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", b"<html>")
    status, _, err = run("flows")
    assert status == 1
    assert "not JSON" in err


def test_a_relay_that_hangs_up(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(10)

        def hang_up() -> None:
            listening.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        status, _, err = run("flows", "--socket", str(path))
        thread.join()
    assert status == 1
    assert "hung up without an answer" in err


# ---- events --------------------------------------------------------------------------------------

EVENT: dict[str, Any] = {
    "id": 7,
    "time": 1_700_000_000.5,
    "type": "rule_up",
    "text": "rule 'a' is up",
    "rule": "a",
}
PAGE = {"run": "0a0b0c0d", "last": 7, "missed": 0, "restarted": False, "events": [EVENT]}


def message(run: str, event: dict[str, Any], kind: str = "") -> bytes:
    return f"id: {run}:{event['id']}\nevent: {kind or event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def test_events(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/events", PAGE)
    status, out, err = run("events")
    assert (status, err) == (0, "")
    assert out.endswith("      7  rule_up          rule 'a' is up\n")
    assert json.loads(run("events", "--json").out) == PAGE


def test_events_that_are_gone_are_said(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/events?since=3", {**PAGE, "missed": 3, "restarted": True})
    _, _, err = run("events", "--since", "3")
    assert "another one" in err
    assert "3 events before these are no longer kept" in err


def test_follow_goes_on_in_the_next_relay(run: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    hello = {key: value for key, value in PAGE.items() if key != "events"} | {"id": 7}
    event_8, event_1 = EVENT | {"id": 8}, EVENT | {"id": 1, "text": "again"}
    relay.answer("GET /v1/events", PAGE)
    relay.answer(
        "GET /v1/events/stream?since=0a0b0c0d:7",
        b"retry: 1\n" + message("0a0b0c0d", hello, "hello") + b": keep-alive\n\n" + message("0a0b0c0d", event_8),
    )
    new = {**hello, "run": "11111111", "restarted": True}
    relay.answer(
        "GET /v1/events/stream?since=0a0b0c0d:8", message("11111111", new, "hello") + message("11111111", event_1)
    )
    pauses = iter([None])

    def pause(_: float) -> None:
        if next(pauses, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr("mrelay.cli.events.time.sleep", pause)
    status, out, err = run("events", "--follow", "--json")
    assert status == 130
    assert [json.loads(line) for line in out.splitlines()] == [EVENT, event_8, event_1]
    assert "another one" in err


STREAM = {
    "rule": "studio-a",
    "source": "10.1.1.9",
    "group": "239.1.1.1",
    "port": 5000,
    "format": "rtp",
    "seen": "not all",
    "units": 1900,
    "lost": 100,
    "loss": 0.05,
    "reordered": 20,
    "duplicates": 40,
    "restarts": 0,
    "excused": 7,
    "bad": 0,
    "jitter": 0.00163,
    "silence": 21.3,
    "details": {"ssrc_changes": 2, "clock": 90000},
    "alarms": ["loss", "silence"],
}


def test_health_shows_what_each_format_can_tell(relay: FakeRelay, run: Run) -> None:
    silent = {**STREAM, "rule": "b", "format": "any", "lost": None, "loss": None, "jitter": None, "alarms": []}
    rule: dict[str, Any] = {"health": "auto", "problem": "", "alarms": []}
    rules = [{"rule": name, **rule} for name in ("studio-a", "b")]
    relay.answer("GET /v1/streams", {"streams": [STREAM, silent], "rules": rules, "left_out": 0})
    out = run("health").out.splitlines()
    assert " ".join(out[1].split()[:9]) == "studio-a 10.1.1.9 239.1.1.1 5000 rtp not all 1,900 100"
    assert "5 %" in out[1] and "1.63 ms" in out[1] and "not heard 7, SSRC changes 2" in out[1]
    assert out[1].endswith("loss, silence") and out[2].split()[8:10] == ["-", "-"]
    assert len(run("health", "b").out.splitlines()) == 2
    assert "no rule 'c' asks for health" in run("health", "c").err
