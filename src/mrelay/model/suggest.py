"""The rule that would relay a stream, as a line for a shell.

Owns how discovery's finds become `mrelay rule add …`. Called by control's discovery. Pure.
"""

import ipaddress
import re
import shlex
from collections.abc import Iterable
from typing import Final

from mrelay.model.endpoint import link_local

_SSM: Final = (ipaddress.ip_network("232.0.0.0/8"), ipaddress.ip_network("ff30::/12"))  # RFC 4607 §1
_TTL: Final = 8  # for a stream that comes with TTL 1


def rule_line(
    interface: str,
    to: str,
    group: str,
    port: int,
    *,
    vlan: int = 0,
    sources: Iterable[str] = (),
    ttl: int = 0,
    name: str = "",
) -> str:
    """`mrelay rule add …` for a stream on `interface`, sent on unchanged at interface `to`.

    `port` 0: all ports. `sources` matter for a source-specific group with one of them. `ttl`: what it came with, 0
    if not known. `name`: what the stream is called, for the rule's name.
    """
    address = ipaddress.ip_address(group)
    from_ = f"{interface}:{_source(address, list(sources))}{_host(address)}:{port or '*'}"
    from_ += f",vlan={vlan}" if vlan else ""
    words = ["mrelay", "rule", "add", rule_name(name, group, port), "--from", from_]
    words += ["--to", f"{to}:*:*" + (f",ttl={_TTL}" if ttl == 1 else "")]
    if link_local(ipaddress.ip_network(group)):
        words.append("--link-local")
    return shlex.join(words)


def rule_name(name: str, group: str, port: int) -> str:
    """A rule's name made of what the stream is called, or else of where it goes."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-").lower()[:64]
    return kept or re.sub(r"[^A-Za-z0-9.]+", "-", f"{group}-{port or 'all'}").strip("-")


def _source(address: ipaddress.IPv4Address | ipaddress.IPv6Address, sources: list[str]) -> str:
    if len(sources) != 1 or not any(address in network for network in _SSM):
        return ""
    return f"{_host(ipaddress.ip_address(sources[0]))}@"


def _host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
