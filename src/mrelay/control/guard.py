"""Who stands before the API on each of its sockets, and turns away whoever may not: before the request is read.

Owns what every request must show (that no other site's page made a browser send it), and what every answer says to
browsers. Who may look and who may change is for a door to say: peers.UnixDoor, tcp.TcpDoor. Nothing here blocks.
"""

import re
from collections.abc import Collection
from typing import Final, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mrelay.control.answers import error

LOOKING: Final = frozenset({"GET", "HEAD"})  # the methods that change nothing
# What a browser may do with the page: nothing that comes from elsewhere, no script or style within HTML, no frame.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# An address, or a name without a dot, which no other site can have; RFC 9110 §7.2 with a port.
_OURS: Final = re.compile(r"\[[0-9a-f:.]+\]|[0-9]{1,3}(\.[0-9]{1,3}){3}|[a-z0-9_-]+")


class Door(Protocol):
    """Who may come in by one of the sockets."""

    def refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to one who may not; None for one who may, whom it names in scope["state"]["peer"].

        scope["state"]["problem"] is then why this one may not change anything, and the remedy, or None.
        """


class Guard:
    """`app`, for whom `door` lets in. `names`: what this host may be called, beside its addresses."""

    def __init__(self, app: ASGIApp, door: Door, names: Collection[str] = ()) -> None:
        self._app, self._door, self._names = app, door, frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        refusal = self._misdirected(headers) or _foreign(headers, scope) or self._door.refusal(scope, headers)
        await (refusal or self._app)(scope, receive, _with_headers(send))

    def _misdirected(self, headers: Headers) -> Response | None:
        """Against DNS rebinding: another site's name that was made to point here."""
        host = headers.get("host", "").lower()
        name = re.sub(r":[0-9]*$", "", host)
        if not host or name in self._names or _OURS.fullmatch(name):
            return None
        remedy = f'use the address, or add it under [relay]: listen_names = ["{name:.100}"]'
        return error(421, "", "", f"this relay does not know itself as {name:.100}", remedy)  # RFC 9110 §15.5.20


def _foreign(headers: Headers, scope: Scope) -> Response | None:
    """Against requests that another site's page makes a browser send (Fetch Metadata; RFC 6454 §7)."""
    path_alone = scope["method"] in LOOKING and not guarded(scope["path"])  # a link may lead to the page
    origin = headers.get("origin")
    same = origin is None or origin.partition("://")[2] == headers.get("host")
    if path_alone or (same and headers.get("sec-fetch-site", "none") in ("none", "same-origin")):
        return None
    return error(403, "", "", "this comes from another site's page", "open the relay's own page, or use mrelay")


def guarded(path: str) -> bool:
    """Whether what is there says anything about the relay; the page's own files don't."""
    return path != "/" and not path.startswith("/page/")


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return with_headers
