"""`mrelay events`: what happened lately in a running relay, and what happens now.

Called by the command line. Blocks on the control socket; with --follow until Ctrl-C.
"""

import json
import sys
import time
from datetime import datetime
from typing import Annotated, Any, Final
from urllib.parse import quote

from cyclopts import Parameter

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.failure import Failure
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Socket

LATEST: Final = 10  # events that --follow begins with
PAUSE: Final = 1.0  # seconds between tries to reach a relay that went


def events(
    *,
    follow: Annotated[bool, Parameter(help="Go on until Ctrl-C.")] = False,
    since: Annotated[
        str | None,
        Parameter(metavar="ID", help="Only what came after this event: ID, or RUN:ID as --json shows it."),
    ] = None,
    as_json: AsJson = False,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """Print what the relay keeps, and follow."""
    client = Client(socket)
    page = client.get("/v1/events" if since is None else f"/v1/events?since={quote(since)}")
    if as_json and not follow:
        output.print_json(page)
        return
    if since is not None:
        _warn(page)
    for event in page["events"][-LATEST if follow and since is None else 0 :]:
        _print(event, as_json)
    if follow:
        _follow(client, f"{page['run']}:{page['last']}", as_json)


def _follow(client: Client, start: str, as_json: bool) -> None:
    """For ever. A relay that goes and comes back costs what happened meanwhile."""
    place, waiting = start, False
    while True:
        try:
            for reached, kind, what in client.stream(f"/v1/events/stream?since={place}"):
                place = reached
                if kind == "hello":
                    _warn(what)
                    waiting = False
                else:
                    _print(what, as_json)
        except Failure as failure:
            if not waiting:
                _say(f"{failure.lines[0]}; waiting for it")
            waiting = True
        time.sleep(PAUSE)


def _warn(page: dict[str, Any]) -> None:
    if page["restarted"]:
        _say("the relay's control process is another one: events from before its start are lost")
    if page["missed"]:
        _say(f"{output.plural(page['missed'], 'event')} before these are no longer kept")


def _say(text: str) -> None:
    print(f"mrelay: {text}", file=sys.stderr, flush=True)


def _print(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(event, ensure_ascii=False), flush=True)
    else:
        at = datetime.fromtimestamp(event["time"]).astimezone()
        print(f"{at:%Y-%m-%d %H:%M:%S}  {event['id']:>5}  {event['type']:<15}  {event['text']}", flush=True)
