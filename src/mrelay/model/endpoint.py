"""Endpoints: where packets come from (Input) and where they go (Output), as text or as a table.

Owns the syntax `IFACE:[SOURCE@]ADDRESS:PORT,option=value,…`; text is split into the same keys that a
table has, so both meet the same checks. Called by the rest of this package, the CLI and the control
role. Every failure is a pydantic.ValidationError whose errors are faults (issue.py). Nothing here blocks.
"""

import functools
import ipaddress
import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mrelay.addresses import address_of
from mrelay.model.issue import Table, fault, show

T = TypeVar("T")
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address
_ADDRESSES = (IPv4Address, IPv6Address)

# Never forwarded by a router: RFC 5771 §4 (local network control), RFC 4291 §2.7 (link-local scope).
LINK_LOCAL: dict[int, Network] = {4: IPv4Network("224.0.0.0/24"), 6: IPv6Network("ff02::/16")}
GROUP_BITS = {4: 4, 6: 8}  # RFC 1112 §4: 224.0.0.0/4, RFC 4291 §2.7: ff00::/8
BROADCAST = IPv4Address("255.255.255.255")  # RFC 919 §7
ALL_PORTS = "*"
# net/core/dev.c dev_valid_name(): shorter than IFNAMSIZ (16), no '/', ':' or space. The others that are
# left out here separate the parts of an endpoint, and no one uses them.
INTERFACE = re.compile(r"(?![.]{1,2}$)[!-~]{1,15}")
SEPARATORS = re.compile(r"[]/:@,*[]")
_DIGITS = re.compile(r"[0-9]{1,9}")


def link_local(groups: Network | Address) -> bool:
    """Whether any of the groups is one that routers never forward."""
    return overlap(groups, LINK_LOCAL[groups.version])


def is_multicast(network: Network) -> bool:
    """Whether it has nothing but groups: `network.is_multicast`, in a tenth of its time."""
    return network.prefixlen >= GROUP_BITS[network.version] and network.network_address.is_multicast


def overlap(one: Network | Address, other: Network | Address) -> bool:
    """Whether any address is in both; of different families, none is."""
    if one.version != other.version:
        return False
    (start, bits), (other_start, other_bits) = _start(one), _start(other)
    return (start ^ other_start) >> (one.max_prefixlen - min(bits, other_bits)) == 0


def _start(what: Network | Address) -> tuple[int, int]:
    """The first address, and how many of its bits all have in common."""
    if isinstance(what, _ADDRESSES):
        return int(what), what.max_prefixlen
    return int(what.network_address), what.prefixlen


def whole(low: int, high: int, example: str) -> Callable[[object], int]:
    """A validator of whole numbers, low to high, given as a number or as text."""

    def check(value: object) -> int:
        if isinstance(value, str) and _DIGITS.fullmatch(value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise fault(f"{show(value)} is not a whole number from {low} to {high}", f"write {example}")

    return check


_port = whole(1, 65535, "a port such as 5000")


def interface_name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise fault(f"{show(value)} is not an interface", "name one, for example eth0; `ip link` lists them")
    if "@" in value:  # as `ip link` prints it: eth0.20@eth0
        raise fault(f"interface {show(value)} has an '@'", f"write {show(value.partition('@')[0])} alone")
    if not INTERFACE.fullmatch(value) or SEPARATORS.search(value):
        raise fault(
            f"{show(value)} can't be an interface's name",
            "names have 1 to 15 visible ASCII characters without / : , * [ ]; `ip link` lists them",
        )
    return value


def _bare(value: object) -> str:
    """The text of an address, without brackets and zone."""
    text = str(value).strip() if isinstance(value, str | Address | Network) else ""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if "%" in text:
        raise fault(f"{show(text)} has a zone", "leave '%' and what follows out: the endpoint names the interface")
    return text


def _network(value: object) -> Network:
    text = _bare(value)
    try:
        return ipaddress.ip_network(text if "/" in text else address_of(text).packed)
    except ValueError:
        pass
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        example = "239.1.1.1, 239.1.0.0/16 or [ff3e::1]"
        raise fault(f"{show(value)} is not an IP address or prefix", f"write for example {example}") from None
    host = text.partition("/")[0]
    raise fault(f"{show(text)} has host bits set", f"write {network} for the prefix, or {host} for one address")


def _address(value: object) -> Address:
    text = _bare(value)
    try:
        address = address_of(text)
    except ValueError:
        remedy = "write one address, for example 239.1.1.1 or [ff3e::1], or * to keep the input's"
        what = "is a prefix, and an output is one address" if "/" in text else "is not an IP address"
        raise fault(f"{show(value)} {what}", remedy) from None
    if address.is_unspecified or address == BROADCAST:
        raise fault(f"{address} is neither a group nor a host", "write a multicast group or a host's address")
    return address


def _input_address(value: object) -> Network:
    if value == "*":
        raise fault("an input needs an address", "write a group or a prefix, for example 239.0.0.0/8")
    network = _network(value)
    if is_multicast(network):
        return network
    if network.prefixlen != network.max_prefixlen:
        raise fault(
            f"{network} is not a prefix of multicast groups",
            "write a prefix inside 224.0.0.0/4 or ff00::/8, or one address of this host",
        )
    _address(network.network_address)
    return network


def _input_source(value: object) -> Network | None:
    if value is None:
        return None
    network = _network(value)
    if network.is_multicast or network.is_unspecified:
        raise fault(f"{text_of(network)} can't be a source", "write the sender's own address before '@'")
    return network


def _output_source(value: object) -> Address | Literal["egress", "keep"]:
    if value == "egress":
        return "egress"
    if value == "keep":
        return "keep"
    try:
        address = ipaddress.ip_address(_bare(value))
    except ValueError:
        remedy = "write egress, keep, or one address such as 10.0.0.1"
        raise fault(f"source {show(value)} is not an IP address", remedy) from None
    if address.is_multicast or address.is_unspecified or address == BROADCAST:
        raise fault(f"{address} can't be a source", "write egress, keep, or a host's address such as 10.0.0.1")
    return address


def _same_family(source: T, info: ValidationInfo) -> T:
    """A source and the address beside it are of one family."""
    address = info.data.get("address")
    ours = getattr(source, "version", None)
    if address is not None and ours not in (None, address.version):
        problem = f"the source is IPv{ours} and the address {text_of(address)} is IPv{address.version}"
        raise fault(problem, f"write an IPv{address.version} source")
    return source


def _keeping(word: str, check: Callable[[object], T]) -> Callable[[object], T | None]:
    """check, but None where the text is the word that says so."""
    return lambda value: None if value is None or value == word else check(value)


def _output_port(value: object) -> int:
    if isinstance(value, str) and "-" in value:
        raise fault(
            f"{show(value)} is a range, and an output has one port",
            "write one port such as 6000, or * to keep the input's",
        )
    return _port(value)


def text_of(network: Network | Address) -> str:
    """An address or prefix as it stands in an endpoint: a host without its /32, IPv6 in brackets."""
    if not isinstance(network, Address) and network.prefixlen == network.max_prefixlen:
        network = network.network_address
    return f"[{network}]" if network.version == 6 else str(network)


def split_endpoint(text: str, example: str) -> dict[str, str]:
    """'IFACE:[SOURCE@]ADDRESS:PORT,option=value' -> the keys of a table, values unchecked.

    Raises a fault if the parts can't be told apart.
    """
    head, *options = (part.strip() for part in text.split(","))
    interface, _, rest = head.partition(":")
    source, at, target = rest.rpartition("@")
    if ":" in source and not source.startswith("["):
        raise _no_brackets(f"{interface}:[{source}]@{target}")
    address, port = _split_target(interface, target, example)
    fields = {"interface": interface, "address": address, "port": port}
    for option in [f"source={source}"] * bool(at) + options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not (key and equals and value):
            raise fault(
                f"{show(option)} is not an option", f"write key=value after each comma: {example},source=…"
            )
        if key in fields:
            raise fault(f"{show(key)} is given twice", "give it once")
        fields[key] = value
    return fields


def _split_target(interface: str, target: str, example: str) -> tuple[str, str]:
    """'ADDRESS:PORT' -> its two parts; only the brackets tell the colons of IPv6 from the port's."""
    if target.startswith("["):
        address, closed, port = target.partition("]")
        if not closed:
            raise fault(f"{show(target)} has '[' and no ']'", "close it after the address: eth1:[ff3e::1]:6000")
        if port.startswith("/"):
            raise fault(
                f"{show(target)} has its prefix length outside the brackets",
                "put it inside: eth1:[ff3e::/64]:6000",
            )
        if port[:1] == ":" and port[1:]:
            return address + "]", port[1:]
        raise fault(f"{show(target)} has no port", f"add one: {interface}:{address}]:5000")
    address, _, port = target.rpartition(":")
    if ":" in address:
        whole_target = not _is_address(address) or not port
        right = f"[{target}]:6000" if whole_target and _is_address(target) else f"[{address}]:{port}"
        raise _no_brackets(f"{interface}:{right}")
    if address and port:
        return address, port
    if _is_address(interface.rpartition("@")[2]):
        raise fault("no interface is named", f"put it first: {example}")
    if _is_address(target.rstrip(":")):
        raise fault(f"{show(target)} has no port", f"add one: {interface}:{target.rstrip(':')}:5000")
    raise fault("this is not IFACE:[SOURCE@]ADDRESS:PORT", f"write for example {example}")


def _no_brackets(right: str) -> PydanticCustomError:
    return fault("an IPv6 address stands without brackets", f"write {right[:100]}")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return text == "*"
    return True


class PortRange(Table):
    """UDP ports low to high, both within 1..65535; as text 5000, 5000-5999 or * (all)."""

    WHAT: ClassVar[str] = "a port range"
    EXAMPLE: ClassVar[str] = 'port = 5000, or "5000-5999", or "*"'

    low: Annotated[int, PlainValidator(_port)] = Field(examples=["5000"])
    high: Annotated[int, PlainValidator(_port)] = Field(examples=["5999"])

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _in_order(self.low, self.high)
        return self

    def __str__(self) -> str:
        if (self.low, self.high) == (1, 65535):
            return ALL_PORTS
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def _in_order(low: int, high: int) -> None:
    if low > high:
        raise fault(f"range {low}-{high} runs backwards", f"write {high}-{low}")


def _ports(value: object, table: ValidatorFunctionWrapHandler) -> PortRange:
    """Text is as good as a table."""
    made: PortRange = _ports_of(value) if isinstance(value, str | int) else table(value)
    return made


@functools.lru_cache(1024, typed=True)  # thousands of rules have few of them
def _ports_of(value: str | int) -> PortRange:
    if value == ALL_PORTS:
        return PortRange(low=1, high=65535)
    first, dash, last = value.partition("-") if isinstance(value, str) else (value, "", value)
    low, high = _port(first), _port(last if dash else first)
    _in_order(low, high)
    return PortRange(low=low, high=high)


class Endpoint(Table):
    """What Input and Output share: an interface, and that text is as good as a table."""

    interface: Annotated[str, PlainValidator(interface_name)] = Field(examples=['"eth0"'])

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return split_endpoint(value, cls.EXAMPLE) if isinstance(value, str) else value

    @classmethod
    def parse(cls, text: str) -> Self:
        """The endpoint that text says; raises pydantic.ValidationError (issues_of() explains it)."""
        return cls.read(text)

    @functools.cached_property
    def text(self) -> str:
        """As an operator writes it, in one spelling; kept, since it is asked for again and again."""
        return self._text()

    def _text(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.text


class Input(Endpoint):
    """What a rule matches: `eth0:10.1.1.9@232.1.1.1:5000,vlan=20`.

    address is a group, a prefix of groups, or an address of this host; without vlan only untagged
    frames match; source may be a prefix, and None is any.
    """

    WHAT: ClassVar[str] = "an input"
    EXAMPLE: ClassVar[str] = "eth0:239.1.1.1:5000"

    address: Annotated[Network, PlainValidator(_input_address)] = Field(examples=['"239.1.1.1"'])
    ports: Annotated[PortRange, WrapValidator(_ports)] = Field(validation_alias="port", examples=["5000"])
    source: Annotated[Network | None, PlainValidator(_input_source), AfterValidator(_same_family)] = None
    vlan: Annotated[int | None, PlainValidator(_keeping("untagged", whole(1, 4094, "a VLAN such as 20")))] = None

    def _text(self) -> str:
        source = f"{text_of(self.source)}@" if self.source else ""
        vlan = f",vlan={self.vlan}" if self.vlan else ""
        return f"{self.interface}:{source}{text_of(self.address)}:{self.ports}{vlan}"


class Output(Endpoint):
    """Where a rule sends: `wg0:10.100.0.2:6000,ttl=8,source=keep,dscp=46`.

    address and port None (`*`) keep the input's; ttl None decrements; dscp None keeps the packet's;
    source is the egress interface's address, the packet's own (keep), or the one given.
    """

    WHAT: ClassVar[str] = "an output"
    EXAMPLE: ClassVar[str] = "eth1:239.2.2.2:6000"

    address: Annotated[Address | None, PlainValidator(_keeping("*", _address))] = Field(examples=['"239.2.2.2"'])
    port: Annotated[int | None, PlainValidator(_keeping("*", _output_port))] = Field(examples=["6000"])
    ttl: Annotated[
        int | None,
        PlainValidator(_keeping("decrement", whole(1, 255, "1 to 255, or leave ttl out to decrement"))),
    ] = None
    source: Annotated[
        Literal["egress", "keep"] | IPv4Address | IPv6Address,
        PlainValidator(_output_source),
        AfterValidator(_same_family),
    ] = "egress"
    dscp: Annotated[
        int | None, PlainValidator(_keeping("keep", whole(0, 63, "0 to 63, or leave dscp out to keep it")))
    ] = None

    def _text(self) -> str:
        address = text_of(self.address) if self.address else "*"
        ttl = "" if self.ttl is None else f",ttl={self.ttl}"
        source = self.source if isinstance(self.source, str) else text_of(self.source)
        source = "" if source == "egress" else f",source={source}"
        dscp = "" if self.dscp is None else f",dscp={self.dscp}"
        return f"{self.interface}:{address}:{self.port or '*'}{ttl}{source}{dscp}"
