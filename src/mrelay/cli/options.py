"""Options that several commands share, so that each has one name, one help text and one default.

Also what a shell completes: names of running rules, asked of the relay while somebody waits at the Tab key.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter, validators

from mrelay.cli.failure import Failure

if TYPE_CHECKING:
    from cyclopts.completion import CompletionContext

_AT_THE_KEY: Final = 1.0  # seconds that a completion may take
DEFAULT_SOCKET: Final = Path("/run/mrelay/control.sock")

Level = Literal["debug", "info", "warning", "error", "critical"]  # logs.LEVELS

Socket = Annotated[
    Path,
    Parameter(name="--socket", env_var="MRELAY_SOCKET", metavar="PATH", help="The relay's control socket."),
]
PinDir = Annotated[
    Path,
    Parameter(
        name="--pin-dir",
        metavar="DIR",
        help="A folder in a BPF file system, made if missing: in it the kernel's fast path outlives the relay.",
    ),
]
AsJson = Annotated[bool, Parameter(name="--json", help="Print JSON for programs.")]
Watch = Annotated[bool, Parameter(name="--watch", help="Keep the table live until Ctrl-C.")]
Every = Annotated[
    float,
    Parameter(
        name="--every",
        metavar="SECONDS",
        validator=validators.Number(gte=0.1, lte=3600),
        help="With --watch: seconds between refreshes, 0.1 to 3600.",
    ),
]


def running_rules(context: "CompletionContext") -> list[str]:
    """The names of the running rules, for completion; none when no relay answers soon."""
    from mrelay.cli.client import Client  # not all who have these options are clients

    path = context["socket"].value
    try:
        answer = Client(path).request("GET", "/v1/rules", patience=_AT_THE_KEY)
    except Failure:
        return []  # a shell shows nothing else
    return [rule["name"] for rule in answer["rules"]]
