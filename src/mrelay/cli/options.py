"""Options that several commands share, so that each has one name, one help text and one default."""

from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Parameter, validators

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
