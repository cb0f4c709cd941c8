"""What stands before the API: tokens, the guard of each socket, and the limits on who comes over TCP."""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fake_roles import run
from mrelay.control import server, tokens
from mrelay.control.guard import Guard
from mrelay.control.peers import Access, Peer, UnixDoor
from mrelay.control.server import Server, TcpProtocol
from mrelay.control.tokens import BadTokens, Tokens

LOOK, CHANGE = "l" * 43, "c" * 43


def test_what_a_token_allows() -> None:
    known = Tokens([("look", LOOK), ("change", CHANGE), ("look", "x" * 43)])
    assert known.kind_of(LOOK.encode()) == "look" == known.kind_of(b"x" * 43)
    assert known.kind_of(CHANGE.encode()) == "change"
    assert known.kind_of(b"") is None is known.kind_of(LOOK.encode()[:-1])
    assert Tokens([("look", LOOK), ("change", LOOK)]).kind_of(LOOK.encode()) == "change"
    assert Tokens([]).kind_of(b"") is None


@given(st.binary(max_size=64))
def test_no_other_bytes_are_a_token(token: bytes) -> None:
    assert Tokens([("look", LOOK)]).kind_of(token) is None or token == LOOK.encode()


def test_the_file_is_made_once(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    tokens.load(directory)
    text = (tmp_path / tokens.NAME).read_text()
    assert stat.S_IMODE((tmp_path / tokens.NAME).stat().st_mode) == 0o600
    found = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    again = tokens.load(directory)
    os.close(directory)
    assert {kind: again.kind_of(token.encode()) for kind, token in found.items()} == {
        "look": "look",
        "change": "change",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == [tokens.NAME]


def test_a_file_for_everyone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / tokens.NAME).write_text(f"look {LOOK}\n")
    (tmp_path / tokens.NAME).chmod(0o644)
    directory = os.open(tmp_path, os.O_RDONLY)
    assert tokens.load(directory).kind_of(LOOK.encode()) == "look"
    assert "chmod 600" in caplog.text
    (tmp_path / tokens.NAME).unlink()
    (tmp_path / tokens.NAME).symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic links"):
        tokens.load(directory)
    os.close(directory)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("look short", 1),
        (f"look {LOOK}\n\nChange {CHANGE}", 3),
        (f"look {LOOK} {CHANGE}", 1),
        (f"look {'é' * 43}", 1),
        (LOOK, 1),
        ("# a comment\nlook", 2),
    ],
)
def test_a_bad_line_is_named(text: str, line: int) -> None:
    with pytest.raises(BadTokens, match=f"line {line} of the file tokens is no token — write"):
        tokens.parse(text)


async def _hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(f"hello {scope['state']['problem']}")(scope, receive, send)


async def ask(app: ASGIApp, method: str, path: str, **headers: str) -> int:
    """The status of one request by a client without rights, over the Unix socket."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "state": {"peer": Peer(1, 61000, frozenset())},
    }
    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "relay"}, 200),
        ({"host": "localhost:8080", "origin": "http://localhost:8080", "sec_fetch_site": "same-origin"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost", "sec_fetch_site": "cross-site"}, 403),
        ({"host": "evil", "origin": "http://evil", "sec_fetch_site": "cross-site"}, 403),
    ],
)
def test_a_forwarded_unix_socket_is_no_way_in_for_other_sites(headers: dict[str, str], status: int) -> None:
    """`ssh -L 8080:/run/mrelay/control.sock` puts it before the browser, where each site could reach it."""

    async def work() -> None:
        app = Guard(_hello, UnixDoor(Access(0, 0)))
        assert await ask(app, "GET", "/v1/rules", **headers) == status
        assert await ask(app, "POST", "/v1/stop", **headers) == max(status, 403), "by one who may only look"

    run(work)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[int]:
    """A server over TCP on loopback; its port."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    it = Server(app, sock, TcpProtocol)
    life = asyncio.create_task(it.run_here())
    try:
        yield port
    finally:
        await it.stop()
        await life


async def _plain(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await PlainTextResponse("x" * (int(scope["path"][1:] or 1)))(scope, receive, send)


async def talk(port: int, data: bytes) -> bytes:
    """All that is answered, until the other end hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b"reset"
    finally:
        writer.close()


def test_an_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the connection is kept: patience is for who says nothing."""
    monkeypatch.setattr(server, "PATIENCE", 0.2)

    async def work() -> None:
        async with serving(_plain) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200" in await reader.readuntil(b"\r\n\r\nx")
                await asyncio.sleep(0.25)  # longer than the patience that a whole request no longer needs
            writer.close()

    run(work)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc",
    ],
    ids=["nothing", "a line", "headers", "a body"],
)
def test_who_does_not_finish_a_request_is_hung_up_on(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.2)

    async def work() -> None:
        async with serving(_plain) as port, asyncio.timeout(5):
            assert await talk(port, data) in (b"", b"reset")

    run(work)


def test_small_pieces_buy_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.2)

    async def work() -> None:
        async with serving(_plain) as port, asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nX: ")
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.02)
            writer.close()

    run(work)


def test_who_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.2)

    async def work() -> None:
        async with serving(_plain) as port, asyncio.timeout(5):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", port))
                await loop.sock_sendall(client, b"GET /30000000 HTTP/1.1\r\nHost: x\r\n\r\n")
                await asyncio.sleep(0.5)
                got = 0
                with contextlib.suppress(ConnectionResetError):
                    while data := await loop.sock_recv(client, 1 << 20):
                        got += len(data)
                assert 0 < got < 30_000_000, "what the kernel held, and no more"

    run(work)


def test_headers_without_end_are_refused() -> None:
    async def work() -> None:
        async with serving(_plain) as port, asyncio.timeout(5):
            answer = await talk(port, b"GET / HTTP/1.1\r\nX: " + b"x" * (64 << 10))
            assert answer.startswith(b"HTTP/1.1 400") or answer == b"reset"

    run(work)


def test_no_more_connections_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)

    async def work() -> None:
        async with serving(_plain) as port, asyncio.timeout(5):
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            assert await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") in (b"", b"reset")
            for _, writer in held:
                writer.close()
                await writer.wait_closed()
            answer = await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer.endswith(b"x"), "there is room again"

    run(work)
