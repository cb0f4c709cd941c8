"""Where a relay pins its fast path in a BPF file system, and how that is taken away again.

Owns the folder's name and what is in it. Called by supervisor.fastpath and by `mrelay stop --flush`. Standard
library only; nothing here blocks.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Final

from mrelay.kernel.libbpf import is_bpffs

PIN_DIR: Final = Path("/sys/fs/bpf/mrelay")  # of every relay on a host, if nothing else is said
LINK: Final = "link-"  # and an ifindex: the program's place at tc ingress of that interface
XDP: Final = "xdp-"  # the same for XDP
LAND: Final = "land-"  # the same for the program on lo, in the folder of its maps
MAPS: Final = "maps-"  # and a digest of what the maps in it were made for


def pin_folder(socket_path: str, pin_dir: Path) -> Path | None:
    """Where the relay of this API socket has its pins, in this network namespace; None if that is in no bpffs.

    `pin_dir` need not be there yet.
    """
    if not is_bpffs(pin_dir):
        return None
    network = os.stat("/proc/self/ns/net").st_ino
    name = re.sub(r"[^A-Za-z0-9_-]", "_", socket_path.strip("/"))  # bpffs allows no dots
    return pin_dir / f"{name[-200:]}-{network}"


def links(folder: Path, kind: str = LINK) -> dict[int, Path]:
    """The pinned links of a kind (LINK, XDP) by ifindex."""
    return {int(path.name.removeprefix(kind)): path for path in folder.glob(f"{kind}*")}


def flush(folder: Path) -> int:
    """Remove a relay's pins: the kernel stops forwarding for it. How many interfaces that was at. OSError."""
    found = links(folder)
    for path in (*links(folder, XDP).values(), *found.values()):
        path.unlink()
    shutil.rmtree(folder)
    return len(found)
