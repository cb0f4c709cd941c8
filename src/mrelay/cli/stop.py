"""`mrelay stop`: ends the running relay, and what one left in the kernel. Blocks until the relay is gone."""

import os
import select
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from mrelay.cli.client import Client
from mrelay.cli.failure import NOT_PERMITTED, Failure
from mrelay.cli.options import DEFAULT_SOCKET, PinDir, Socket
from mrelay.cli.output import plural
from mrelay.ebpf.pins import BPFFS, pin_folder
from mrelay.ebpf.pins import flush as flush_pins

_DEADLINE: Final = 30.0  # seconds: longer than a stop may take


def stop(
    *,
    flush: Annotated[bool, Parameter(help="End what the kernel forwards by itself as well.")] = False,
    pin_dir: PinDir = BPFFS,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """Stop the relay, if one runs; with --flush, remove what one left behind."""
    client = Client(socket)
    try:
        pid = client.get("/v1/health")["pid"]
    except Failure:
        folder = pin_folder(str(socket.absolute()), pin_dir)
        if not flush or folder is None or not _is_there(folder):
            raise
        print(f"no relay runs; the kernel forwards no more at {plural(flush_pins(folder), 'interface')}")
        return
    flows = client.request("POST", f"/v1/stop?flush={str(flush).lower()}")["flows"]
    _await_end(pid)
    goes_on = (
        f"; the kernel goes on to forward {plural(flows, 'flow')}, until the next start or 'mrelay stop --flush'"
    )
    print(f"stopped{goes_on if flows else ''}")


def _is_there(folder: Path) -> bool:
    try:
        return folder.exists()
    except PermissionError:
        raise Failure(
            f"not allowed to look into {folder.parent}: try again with sudo", status=NOT_PERMITTED
        ) from None


def _await_end(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([process], [], [], _DEADLINE)[0]:
            raise Failure(f"the relay (process {pid}) did not end within {_DEADLINE:.0f} s: see its log")
    finally:
        os.close(process)
