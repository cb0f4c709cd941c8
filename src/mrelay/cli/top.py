"""`mrelay top`: a running relay's rules and flows, live in the terminal.

Called by the command line. Blocks on the control socket; without --once until the user quits.
"""

import sys
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import RenderableType

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.failure import USAGE, Failure
from mrelay.cli.options import DEFAULT_SOCKET, Every, Socket
from mrelay.cli.top_model import COLUMNS, MOST, Model, View, aligned


def top(
    *,
    once: Annotated[bool, Parameter(help="Print one frame, for a script.")] = False,
    show: Annotated[Literal["rules", "flows"], Parameter(help="What to begin with.")] = "rules",
    sort: Annotated[
        Literal["packets", "bits", "name", "state"],
        Parameter(help="By packets or bits a second, by name, or what is not up first."),
    ] = "packets",
    find: Annotated[
        str, Parameter(name="--filter", metavar="TEXT", help="Only lines that have these words in them.")
    ] = "",
    every: Every = 1.0,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """Fetch, draw, and take keys."""
    client, model = Client(socket), Model()
    fetch(client, model, every)
    if once:
        output.print_view(_frame(model, show, sort, find))
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Failure("top needs a terminal: add --once for one frame", status=USAGE)
    from mrelay.cli.top_app import TopApp  # here, because it takes a third of a second to import

    TopApp(client, model, show, sort, find, every).run()


def fetch(client: Client, model: Model, seconds: float) -> None:
    """Ask the relay once. Failure when it does not answer."""
    stats = client.get("/v1/stats")
    model.take(stats, client.get(f"/v1/flows?limit={MOST}")["flows"], seconds)


def _frame(model: Model, view: View, sort: str, find: str) -> RenderableType:
    """Without the minute before, of which a single look knows nothing."""
    rows = [_without_spark(row.cells) for row in model.rows(view, sort, find)]
    columns = _without_spark(COLUMNS[view])
    table = output.table(columns, rows, right=aligned(columns)) if rows else f"No {view}."
    return output.stack(*model.summary(), "", table)


def _without_spark(cells: tuple[str, ...]) -> tuple[str, ...]:
    at = COLUMNS["rules"].index("LAST MINUTE")
    return cells[:at] + cells[at + 1 :]
