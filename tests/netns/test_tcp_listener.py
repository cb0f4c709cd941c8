"""The API over TCP, on a real relay: who gets in, what they may do, and what becomes of it when things end."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from pytest import Subtests

from netns.lab import Lab, Namespace, Star, eventually
from netns.relay import Relay, rule

pytestmark = pytest.mark.netns
PORT = 8080
LOOPBACK = f'[relay]\nlisten = "127.0.0.1:{PORT}"\nlisten_names = ["relay.example.org"]\nworkers = 1\n'
CONFIG = LOOPBACK + rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")
NEW = {"name": "b", "from": "in0:239.1.1.2:5000", "to": ["out0:239.2.2.3:6000"]}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


def ask(
    namespace: Namespace,
    method: str,
    path: str,
    *,
    token: str = "",
    body: object = None,
    address: str = "127.0.0.1",
    **headers: str,
) -> Answer:
    """One request over TCP; `headers` with _ for -."""

    connection = http.client.HTTPConnection(address, PORT, timeout=10)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        sent["Authorization"] = f"Bearer {token}"
    if body is not None:
        sent["Content-Type"] = "application/json"
    with namespace.inside():
        connection.connect()
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        response = connection.getresponse()
        data = response.read()
    found = {name.lower(): value for name, value in response.getheaders()}
    is_json = "json" in found.get("content-type", "")
    return Answer(response.status, found, json.loads(data) if is_json and data else data.decode())


def tokens_of(relay: Relay) -> dict[str, str]:
    """By kind."""
    text = (relay.state_dir / "tokens").read_text()
    return dict(line.split() for line in text.splitlines() if line and not line.startswith("#"))


def listening(relay: Relay) -> bool:
    try:
        return ask(relay.namespace, "GET", "/v1/health").status == 401
    except OSError:
        return False


@pytest.fixture(scope="module")
def star() -> Iterator[Star]:
    with Lab() as lab:
        yield lab.star()


@pytest.fixture(scope="module")
def relay(star: Star) -> Iterator[Relay]:
    with Relay(star.relay, CONFIG) as it:
        eventually(lambda: listening(it), "the listener")
        yield it


def test_tokens(relay: Relay) -> None:
    """Made at the first start, for control's user alone; the log says where."""
    info = (relay.state_dir / "tokens").stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_uid == relay.state_dir.stat().st_uid != 0
    tokens = tokens_of(relay)
    assert tokens.keys() == {"look", "change"} and len(set(tokens.values())) == 2
    assert all(len(token) >= 43 for token in tokens.values())
    assert f"http://127.0.0.1:{PORT}/, tokens in {relay.state_dir}/tokens" in relay.stderr
    assert not any(token in relay.stderr for token in tokens.values())


def test_who_gets_in(relay: Relay, subtests: Subtests) -> None:
    tokens, where = tokens_of(relay), relay.namespace
    for token, change in ((tokens["look"], False), (tokens["change"], True)):
        with subtests.test(change=change):
            assert ask(where, "GET", "/v1/access", token=token).body["change"] is change
            assert ask(where, "GET", "/metrics", token=token).status == 200
            assert ask(where, "GET", "/openapi.json", token=token).status == 200
    assert ask(where, "GET", "/v1/access").body["look"] is False
    for wrong in ("", "x", tokens["look"][:-1], tokens["look"] + "x", "\xff" * 43):
        with subtests.test(wrong=wrong):
            for path in ("/v1/health", "/v1/rules", "/metrics", "/openapi.json", "/nothing", "/v1/../v1/rules"):
                answer = ask(where, "GET", path, token=wrong)
                assert (answer.status, answer.headers["www-authenticate"]) == (401, 'Bearer realm="mrelay"')
    with subtests.test("another scheme"):
        assert ask(where, "GET", "/v1/rules", Authorization=f"Basic {tokens['look']}").status == 401
        assert ask(where, "GET", f"/v1/rules?token={tokens['look']}").status == 401
        assert ask(where, "GET", "/v1/rules", Cookie=f"token={tokens['look']}").status == 401


def test_who_may_change(relay: Relay) -> None:
    tokens, where = tokens_of(relay), relay.namespace
    refused = ask(where, "POST", "/v1/rules", token=tokens["look"], body=NEW)
    assert refused.status == 403 and "'change'" in refused.body["errors"][0]["remedy"]
    assert ask(where, "POST", "/v1/rules", body=NEW).status == 401
    assert ask(where, "POST", "/v1/rules", token=tokens["change"], body=NEW).status == 201
    assert relay.rules()["b"]["state"] == "up"
    assert ask(where, "DELETE", "/v1/rules/b", token=tokens["look"]).status == 403
    assert ask(where, "DELETE", "/v1/rules/b", token=tokens["change"]).status == 204
    assert set(relay.rules()) == {"a"}
    assert re.search(r"rule b removed by a 'change' token from 127\.0\.0\.1$", relay.stderr, re.MULTILINE)


def test_other_sites(relay: Relay, subtests: Subtests) -> None:
    """A name that was made to point here, and requests that another site's page sends."""
    tokens, where = tokens_of(relay), relay.namespace
    change = tokens["change"]
    for host, status in (
        *((name, 200) for name in ("127.0.0.1:8080", "localhost:9000", "[::1]:1", "Relay.Example.org", "relay")),
        *(
            (name, 421)
            for name in ("evil.example", "127.0.0.1.evil.example:8080", "relay.example.org.evil", "a.b:c")
        ),
    ):
        with subtests.test(host=host):
            assert ask(where, "GET", "/v1/rules", token=change, Host=host).status == status
    for foreign in (
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:8081"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Origin": "http://127.0.0.1:8080"},
    ):
        with subtests.test(foreign=foreign):
            assert ask(where, "POST", "/v1/rules", token=change, body=NEW, **foreign).status == 403
            assert ask(where, "GET", "/v1/rules", token=change, **foreign).status == 403
    with subtests.test("the page itself"):
        own = {"Sec_Fetch_Site": "same-origin", "Origin": "http://127.0.0.1:8080"}
        assert ask(where, "GET", "/v1/rules", token=change, **own).status == 200
    with subtests.test("a proxy with TLS"):
        proxied = {
            "Host": "relay.example.org",
            "Origin": "https://relay.example.org",
            "Sec_Fetch_Site": "same-origin",
        }
        assert ask(where, "GET", "/v1/rules", token=change, **proxied).status == 200
    assert set(relay.rules()) == {"a"}


def test_what_browsers_are_told(relay: Relay) -> None:
    """Of every answer, refusals too."""
    token = tokens_of(relay)["look"]
    for answer in (
        ask(relay.namespace, "GET", "/v1/rules", token=token),
        ask(relay.namespace, "GET", "/v1/rules"),
        ask(relay.namespace, "GET", "/v1/rules", token=token, Host="evil.example"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers and "set-cookie" not in answer.headers


def test_bodies(relay: Relay) -> None:
    token = tokens_of(relay)["change"]
    long = ask(relay.namespace, "POST", "/v1/rules", token=token, Content_Length=str(5 << 20))
    assert long.status == 413
    chunked = ask(relay.namespace, "POST", "/v1/rules", token=token, Transfer_Encoding="chunked")
    assert chunked.status == 411


def test_new_tokens_by_a_reload(relay: Relay) -> None:
    old, new = tokens_of(relay)["look"], "n" * 40
    file = relay.state_dir / "tokens"
    before = file.read_text()
    file.write_text(before.replace(f"look {old}", f"look {new}"))
    relay.signal(signal.SIGHUP)
    eventually(lambda: ask(relay.namespace, "GET", "/v1/rules", token=new).status == 200, "the new token")
    assert ask(relay.namespace, "GET", "/v1/rules", token=old).status == 401
    file.write_text("look short\n")
    relay.signal(signal.SIGHUP)
    eventually(lambda: "line 1 of the file tokens is no token" in relay.stderr, "a refusal of the file")
    assert ask(relay.namespace, "GET", "/v1/rules", token=new).status == 200, "those of before stay"
    file.write_text(before)
    relay.signal(signal.SIGHUP)
    eventually(lambda: ask(relay.namespace, "GET", "/v1/rules", token=old).status == 200, "the old token")


def test_control_that_is_replaced_listens_again(relay: Relay) -> None:
    (control,) = relay.role("control")
    os.kill(control, signal.SIGKILL)
    eventually(lambda: relay.role("control") not in ([], [control]), "another control")
    token = tokens_of(relay)["look"]

    def answered() -> bool:
        try:
            return ask(relay.namespace, "GET", "/v1/rules", token=token).status == 200
        except OSError:
            return False

    eventually(answered, "an answer", 30)


def test_nothing_listens_by_default(star: Star) -> None:
    with Relay(star.sink, "") as relay:
        with pytest.raises(ConnectionRefusedError):
            ask(star.sink, "GET", "/")
        assert not (relay.state_dir / "tokens").exists()


def test_from_other_hosts_nothing_is_changed(star: Star) -> None:
    """The token would cross the network in the clear. An address that comes late is waited for."""
    config = f'[relay]\nlisten = "10.77.0.1:{PORT}"\nworkers = 1\n'
    with Relay(star.source, config) as relay:
        assert f"cannot listen at 10.77.0.1:{PORT}" in relay.stderr
        assert "tokens and answers cross the network in the clear" in relay.stderr
        star.source.ip("address add 10.77.0.1/32 dev lo")
        eventually((relay.state_dir / "tokens").exists, "tokens, for want of which nobody waits to be ready")
        tokens = tokens_of(relay)

        def look(kind: str) -> Answer | None:
            try:
                return ask(star.source, "GET", "/v1/access", token=tokens[kind], address="10.77.0.1")
            except OSError:
                return None

        eventually(lambda: look("look"), "the listener")
        found = look("change")
        assert found is not None and found.body["change"] is False and "in the clear" in found.body["problem"]
        refused = ask(star.source, "POST", "/v1/rules", token=tokens["change"], body=NEW, address="10.77.0.1")
        assert refused.status == 403 and "Unix socket" in refused.body["errors"][0]["remedy"]
        with pytest.raises(ConnectionRefusedError):
            ask(star.source, "GET", "/")  # at another of its addresses


def test_a_port_that_is_taken_keeps_no_stream_from_flowing(star: Star) -> None:
    with star.sink.inside():
        taken = socket.create_server(("127.0.0.1", PORT))
    with taken, Relay(star.sink, f'[relay]\nlisten = "127.0.0.1:{PORT}"\nworkers = 1\n') as relay:
        assert "Address already in use" in relay.stderr
        assert relay.get("/v1/health")["ready"]
