"""`mrelay capture RULE|FLOW`: packets into a pcapng file, as they come in, go out, or are dropped.

Called by the command line. Blocks on the control socket until a bound is reached, or Ctrl-C.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

from cyclopts import Parameter, validators

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.failure import Failure
from mrelay.cli.options import DEFAULT_SOCKET, Socket, running_rules
from mrelay.reasons import DROPS, SHOWN_BY_FRAME

PACKET: Final = 6  # draft-ietf-opsawg-pcapng §4.3
STATISTICS: Final = 5  # §4.6
_ISB_OSDROP: Final = 7
_PIECE: Final = 1 << 16
_UNKNOWN: Final = tuple(reason for reason in DROPS if reason not in SHOWN_BY_FRAME)
_ABOVE_0: Final = validators.Number(gt=0)


def capture(
    what: Annotated[
        str,
        Parameter(
            name="RULE|FLOW",
            help="A rule's name, or a flow: IFACE:[SOURCE@]GROUP:PORT[,vlan=N].",
            completer=running_rules,
        ),
    ],
    /,
    *,
    side: Annotated[
        Literal["in", "out", "dropped"],
        Parameter(help="As they come in, go out, or are dropped."),
    ] = "in",
    write: Annotated[
        Path | None,
        Parameter(
            name=["--write", "-w"],
            metavar="FILE",
            allow_leading_hyphen=True,
            help="- is standard output; default: a new file.",
        ),
    ] = None,
    seconds: Annotated[
        float, Parameter(validator=validators.Number(gt=0, lte=3600), help="How long, up to 3600.")
    ] = 10.0,
    packets: Annotated[int | None, Parameter(validator=_ABOVE_0, help="Stop after so many.")] = None,
    size: Annotated[
        int | None,
        Parameter(name="--bytes", validator=_ABOVE_0, help="Stop before the file is larger; default 100 MB."),
    ] = None,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """POST the request and write what comes."""
    client = Client(socket)
    bounds = {key: value for key, value in {"packets": packets, "bytes": size}.items() if value is not None}
    body = {"what": what, "side": side, "seconds": seconds, **bounds}
    path = write or Path(re.sub(r"[^A-Za-z0-9._-]+", "-", f"{what}-{side}") + ".pcapng")
    before = client.get("/v1/stats")["drops"] if side == "dropped" else {}
    counted = Counted()
    with client.opened("POST", "/v1/capture", body) as answer, _file(path) as file:
        _copy(answer, file, counted)
    _tell(counted, path)
    if side == "dropped":
        _tell_unknown(before, client.get("/v1/stats")["drops"])


def _copy(answer: HTTPResponse, file: BinaryIO, counted: "Counted") -> None:
    """All that comes, until it ends or Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in iter(lambda: answer.read1(_PIECE), b""):
            file.write(counted.whole(piece))
            file.flush()


class Counted:
    """A file as it goes by: only whole blocks, so that it is right wherever it ends; and what they hold."""

    def __init__(self) -> None:
        self._rest = b""
        self.packets = self.bytes = self.missed = 0

    def whole(self, piece: bytes) -> bytes:
        """The blocks that are complete now."""
        data, at = self._rest + piece, 0
        while len(data) - at >= 8 and len(data) - at >= (
            length := int.from_bytes(data[at + 4 : at + 8], "little")
        ):
            self._count(int.from_bytes(data[at : at + 4], "little"), data[at : at + length])
            at += length
        self._rest = data[at:]
        self.bytes += at
        return data[:at]

    def _count(self, kind: int, block: bytes) -> None:
        self.packets += kind == PACKET
        if kind == STATISTICS:
            self.missed += dict(_options(block[20:-4])).get(_ISB_OSDROP, 0)


def _options(data: bytes) -> Iterator[tuple[int, int]]:
    """Code and value of each option that is a number."""
    at = 0
    while code := int.from_bytes(data[at : at + 2], "little"):
        length = int.from_bytes(data[at + 2 : at + 4], "little")
        yield code, int.from_bytes(data[at + 4 : at + 4 + length], "little")
        at += 4 + length + -length % 4


@contextlib.contextmanager
def _file(path: Path) -> Iterator[BinaryIO]:
    if path == Path("-"):
        if sys.stdout.isatty():
            raise Failure("a capture is no text for a terminal: name a file with -w, or pipe it into tshark -r -")
        yield sys.stdout.buffer
        return
    try:
        with path.open("wb") as file:
            yield file
    except OSError as error:
        raise Failure(f"can't write {path}: {error.strerror}") from error


def _tell(counted: Counted, path: Path) -> None:
    missed = f"; {output.count(counted.missed)} frames came too fast and are missing" if counted.missed else ""
    where = "" if path == Path("-") else f" in {path}"
    size = output.scaled(counted.bytes, "B")
    print(f"{output.plural(counted.packets, 'packet')}, {size}{where}{missed}", file=sys.stderr)


def _tell_unknown(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Which drops the capture can't hold, of all rules."""
    risen = {reason: after[reason] - before.get(reason, 0) for reason in _UNKNOWN}
    text = ", ".join(f"{reason} {output.count(count)}" for reason, count in risen.items() if count > 0)
    if text:
        print(f"not in it, since they can't be told from the frame: {text} (of all rules)", file=sys.stderr)
