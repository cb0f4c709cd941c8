"""`mrelay log`: what the running relay logs. Blocks on the control socket."""

from typing import Annotated, Literal

from cyclopts import Parameter

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Level, Socket
from mrelay.logs import ROLES


def log(
    level: Annotated[Level | None, Parameter(help="From which level on; none: print the levels.")] = None,
    /,
    *,
    role: Annotated[
        Literal["supervisor", "control", "worker"] | None, Parameter(help="Only this role; none: all of them.")
    ] = None,
    as_json: AsJson = False,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """GET or PATCH the levels, and print them."""
    client = Client(socket)
    if level is None:
        levels = client.get("/v1/log")
    else:
        levels = client.request("PATCH", "/v1/log", dict.fromkeys([role] if role else ROLES, level))
    if as_json:
        output.print_json(levels)
    else:
        rows = [each for each in levels.items() if role in (None, each[0])]
        output.console().print(output.table(("ROLE", "LEVEL"), rows))
