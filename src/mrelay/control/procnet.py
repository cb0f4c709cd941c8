"""What /proc/net says of memberships: /proc/net/igmp, mcfilter and their IPv6 twins.

Owns descriptors of these files, opened before control is confined; each read begins anew. Called by main (made)
and why. Reading blocks no longer than the kernel takes to write a list.
"""

import contextlib
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Final

_FOLDER: Final = Path("/proc/self/net")
_FILES: Final = ("igmp", "igmp6", "mcfilter", "mcfilter6")


class ProcNet:
    """This network namespace's lists; one that could not be opened is empty, and says nothing."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        self._files = {}
        for name in _FILES:
            with contextlib.suppress(OSError):  # no IPv6, or /proc is hidden
                self._files[name] = (folder / name).open("rb", buffering=0)

    def member(self, ifindex: int, group: str, source: str | None) -> bool | None:
        """Whether the interface is a member of the group (from that source); None when nobody can say."""
        four = ip_address(group).version == 4
        text = self._read("igmp" if four else "igmp6")
        if text is None:
            return None
        if group not in (groups4 if four else groups6)(text, ifindex):
            return False
        if source is None:
            return True
        # The kernel leaves interfaces out of this list whose first group has no sources (igmp_mcf_get_first).
        sources = self._read("mcfilter" if four else "mcfilter6") or ""
        return True if (ifindex, group, source) in filters(sources) else None

    def _read(self, name: str) -> str | None:
        file = self._files.get(name)
        if file is None:
            return None
        try:
            file.seek(0)
            return file.read().decode(errors="replace")
        except OSError:
            return None


# Interfaces are told apart by number: names are cut short in some of the files.


def groups4(text: str, ifindex: int) -> set[str]:
    """The groups of an interface in /proc/net/igmp, whose addresses are in the machine's byte order."""
    found: set[str] = set()
    current = 0
    for line in text.splitlines()[1:]:
        word = line.split()[0]
        if line[0] != "\t":
            current = int(word)
        elif current == ifindex:
            found.add(str(ip_address(int(word, 16).to_bytes(4, sys.byteorder))))
    return found


def groups6(text: str, ifindex: int) -> set[str]:
    """The same in /proc/net/igmp6: number, interface, group …"""
    lines = (line.split() for line in text.splitlines())
    return {str(ip_address(bytes.fromhex(words[2]))) for words in lines if int(words[0]) == ifindex}


def filters(text: str) -> set[tuple[int, str, str]]:
    """(interface, group, source) of /proc/net/mcfilter and mcfilter6 that somebody includes."""
    lines = (line.split() for line in text.splitlines()[1:])
    return {(int(words[0]), _address(words[2]), _address(words[3])) for words in lines if int(words[4]) > 0}


def _address(word: str) -> str:
    """0xe8010101 as 232.1.1.1, 32 digits as an IPv6 address."""
    digits = word.removeprefix("0x")
    return str(ip_address(bytes.fromhex(digits)))
