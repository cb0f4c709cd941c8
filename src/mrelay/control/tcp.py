"""The API and the page over TCP, for those who have a token: off unless the config says where to listen.

Owns that listener, from asking for its socket to its end, and the door before it. Called by main. Nothing here
blocks.
"""

import asyncio
import logging
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, SOCK_STREAM, socket
from typing import Final, NamedTuple

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from mrelay.control import tokens
from mrelay.control.answers import error
from mrelay.control.guard import LOOKING, Guard, guarded
from mrelay.control.server import Server, TcpProtocol
from mrelay.control.supervisor import RequestFailed, Supervisor
from mrelay.control.tokens import BadTokens, Kind, Tokens
from mrelay.model.config import RelaySettings, split_listen

log = logging.getLogger(__name__)

RETRY: Final = 5.0  # seconds until a socket that could not be had is asked for again
MAX_BODY: Final = 4 << 20  # bytes: more than 10,000 rules take
ACCESS: Final = "/v1/access"  # tells everyone what they may do
_NO_TOKEN: Final = ("a token is needed", "send Authorization: Bearer and one of the relay's tokens")
_NO_TLS: Final = (
    "over this address nothing can be changed: the token would cross the network in the clear",
    "use the relay's Unix socket, or listen on loopback behind a proxy with TLS",
)


class Bearer(NamedTuple):
    """A client with a token."""

    kind: Kind
    address: str

    def __str__(self) -> str:
        return f"a '{self.kind}' token from {self.address}"


class TcpDoor:
    """Lets in those with a token; those who may change things only by loopback, where nobody listens in."""

    def __init__(self, *, loopback: bool) -> None:
        self.tokens = Tokens([])
        self._loopback = loopback

    def refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """As guard.Door has it."""
        looking = scope["method"] in LOOKING
        if not guarded(scope["path"]):
            return None if looking else error(405, "", "", "nothing can be changed here", "see /openapi.json")
        kind = self._kind(headers, scope)
        if kind is None:
            scope["state"]["problem"] = _NO_TOKEN
            return None if scope["path"] == ACCESS and looking else _no_token()
        scope["state"]["peer"] = Bearer(kind, _client(scope))
        scope["state"]["problem"] = problem = self._problem(kind)
        if looking:
            return None
        return error(403, "", "", *problem) if problem else _too_much(headers)

    def _kind(self, headers: Headers, scope: Scope) -> Kind | None:
        """Authorization: Bearer (RFC 6750 §2.1)."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        kind = self.tokens.kind_of(token.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        if token and kind is None:
            log.warning("refused %s: no such token", _client(scope))
        return kind

    def _problem(self, kind: Kind) -> tuple[str, str] | None:
        if kind != "change":
            return "this token may look, but not change anything", "use one of those of 'change'"
        return None if self._loopback else _NO_TLS


def _client(scope: Scope) -> str:
    return str((scope.get("client") or ("nobody",))[0])


def _no_token() -> Response:
    answer = error(401, "", "", *_NO_TOKEN)
    answer.headers["WWW-Authenticate"] = 'Bearer realm="mrelay"'
    return answer


def _too_much(headers: Headers) -> Response | None:
    """Of a body; whose length is told, so that it need not be read to know."""
    if "transfer-encoding" in headers:
        return error(411, "", "", "the length of the body is not told", "send Content-Length")
    if int(headers.get("content-length", "0")) > MAX_BODY:
        return error(413, "", "", f"the body is longer than {MAX_BODY} bytes", "use the relay's Unix socket")
    return None


class TcpListener:
    """`directory`: the state directory, whose path is `state_dir`."""

    def __init__(self, settings: RelaySettings, supervisor: Supervisor, directory: int, state_dir: str) -> None:
        """For settings with `listen`."""
        assert settings.listen is not None  # noqa: S101  the caller looked
        self._where, self._names = settings.listen, settings.listen_names
        self._address, self._port = split_listen(settings.listen)
        self._supervisor, self._directory, self._state_dir = supervisor, directory, state_dir
        self._sock: socket | None = None
        self._server: Server | None = None
        self._failed = False
        loopback = ip_address(self._address).is_loopback
        self._door = TcpDoor(loopback=loopback)
        if not loopback:
            log.warning(
                "listen = %s: tokens and answers cross the network in the clear, so nothing can be changed there; "
                "better listen on loopback, and put a proxy with TLS in front",
                self._where,
            )

    async def open(self) -> None:
        """Ask for the socket, before the API's own. It may be had later: the address may be yet to come."""
        try:
            fd = await self._supervisor.listen_tcp(self._address, self._port)
        except RequestFailed as failed:
            if not self._failed:
                log.error("cannot listen at %s: %s; trying again every %.0f s", self._where, failed, RETRY)
            self._failed = True
            return
        # Without its protocol asyncio asks for no TCP_NODELAY, which it may not; connections have it already.
        self._sock = socket(AF_INET6 if ":" in self._address else AF_INET, SOCK_STREAM, 0, fileno=fd)

    async def read_tokens(self) -> None:
        """Read the file; those of before stay when it is bad."""
        try:
            self._door.tokens = await asyncio.to_thread(tokens.load, self._directory)
        except (BadTokens, OSError) as failed:
            log.error("cannot read the tokens in %s: %s; nothing changed", self._state_dir, failed)

    async def run(self, app: ASGIApp) -> None:
        """Serve `app`, as soon as there is a socket, until `stop`."""
        await self.read_tokens()
        while self._sock is None:
            await asyncio.sleep(RETRY)
            await self.open()
        log.info("page at http://%s/, tokens in %s/%s", self._where, self._state_dir, tokens.NAME)
        self._server = Server(Guard(app, self._door, self._names), self._sock, TcpProtocol)
        await self._server.run_here()

    async def stop(self) -> None:
        """Let requests under way end, and stop."""
        if self._server is not None:
            await self._server.stop()
