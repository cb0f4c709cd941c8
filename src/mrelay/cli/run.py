"""`mrelay run`: reads the flags, then becomes the supervisor. Blocks on nothing.

The supervisor keeps this process's id, so that systemd, a shell or a test signals the relay itself.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from cyclopts import Parameter

from mrelay.cli.failure import BAD_CONFIG, Failure
from mrelay.cli.options import DEFAULT_SOCKET, Level, PinDir, Socket
from mrelay.ebpf.pins import PIN_DIR

DEFAULT_STATE_DIR: Final = Path("/var/lib/mrelay")


def _workers(_: object, tokens: Any) -> str | int | list[int]:
    """`auto`, a number of workers, or a list of cores (`0,2`; one core alone: `0,`)."""
    text = tokens[0].value
    if text == "auto":
        return "auto"
    if not all(part.isascii() and part.isdigit() for part in text.rstrip(",").split(",")):
        raise ValueError(f"'{text}' is not auto, a number of workers, or a list of cores such as 0,2")
    if "," not in text:
        if int(text) < 1:
            raise ValueError("a relay needs at least 1 worker; for core 0 alone write '0,'")
        return int(text)
    return sorted({int(part) for part in text.rstrip(",").split(",")})


def run(
    *,
    config: Annotated[
        Path | None, Parameter(metavar="FILE", help="Config file; none: start without rules.")
    ] = None,
    engine: Annotated[
        Literal["auto", "ebpf", "uring"] | None, Parameter(help="How packets are moved; overrides the file.")
    ] = None,
    workers: Annotated[
        str | int | list[int] | None,
        Parameter(
            converter=_workers,
            n_tokens=1,
            accepts_keys=False,
            metavar="auto|N|CORES",
            help="One worker a core: auto, a number, or cores such as 0,2; overrides the file.",
        ),
    ] = None,
    socket: Socket = DEFAULT_SOCKET,
    state_dir: Annotated[
        Path, Parameter(metavar="DIR", help="Where the relay keeps its state over a restart.")
    ] = DEFAULT_STATE_DIR,
    pin_dir: PinDir = PIN_DIR,
    user: Annotated[
        str | None,
        Parameter(metavar="NAME", help="The user that control runs as; none: mrelay, or else nobody."),
    ] = None,
    worker_user: Annotated[
        str | None,
        Parameter(metavar="NAME", help="The user that workers run as; none: mrelay-worker, or else control's."),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], Parameter(help="Lines for people, or a JSON object a line.")
    ] = "text",
    log_level: Annotated[
        Level, Parameter(help="What is logged; 'mrelay log' changes it while the relay runs.")
    ] = "info",
) -> NoReturn:
    """Become the supervisor, with these settings as its one JSON argument."""
    if config is not None and not config.exists():
        raise Failure(f"no config file at {config}: name one with --config", status=BAD_CONFIG)
    settings = {
        "config": None if config is None else str(config.absolute()),
        "engine": engine,
        "workers": workers,
        "socket": str(socket.absolute()),
        "state_dir": str(state_dir.absolute()),
        "pin_dir": str(pin_dir.absolute()),
        "user": user,
        "worker_user": worker_user,
        "log_format": log_format,
        "log_level": log_level,
    }
    sys.stdout.flush()
    command = [sys.executable, "-P", "-m", "mrelay.supervisor", json.dumps(settings)]
    os.execv(sys.executable, command)  # noqa: S606  no shell is what is wanted
