"""Hypothesis strategies for what the model accepts: endpoints and rules as tables, and whole configs."""

import ipaddress
import string
from typing import Any, Literal

from hypothesis import strategies as st

from mrelay.model.config import Config
from mrelay.model.rule import check_rules

Table = dict[str, Any]
Version = Literal[4, 6]

versions: st.SearchStrategy[Version] = st.sampled_from([4, 6])

interfaces = st.text(string.ascii_letters + string.digits + "._-+~", min_size=1, max_size=15).filter(
    lambda name: name not in {".", ".."}
)
ports = st.integers(1, 65535)
port_ranges = st.tuples(ports, ports).map(lambda pair: f"{min(pair)}-{max(pair)}")
names = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=64)
# Past the groups that need link_local = true.
groups = {4: st.integers(0xE0000100, 0xEFFFFFFF), 6: st.integers(0xFF3E << 112, (0xFF3F << 112) - 1)}
hosts: dict[Version, str] = {4: "10.0.0.0/8", 6: "2001:db8::/32"}


def addresses(version: Version) -> st.SearchStrategy[str]:
    """Hosts and groups of one family."""
    host = st.ip_addresses(v=version, network=hosts[version]).map(str)
    return host | groups[version].map(lambda number: str(ipaddress.ip_address(number)))


@st.composite
def prefixes(draw: st.DrawFn, version: Version) -> str:
    """A prefix of groups."""
    group = ipaddress.ip_address(draw(groups[version]))
    length = draw(st.integers(24, group.max_prefixlen))
    return str(ipaddress.ip_network(f"{group}/{length}", strict=False))


@st.composite
def input_tables(draw: st.DrawFn) -> Table:
    """An Input as a table."""
    version = draw(versions)
    source = st.ip_addresses(v=version, network=hosts[version]).map(str)
    options = {"source": source | st.just(hosts[version]), "vlan": st.integers(1, 4094)}
    table: Table = {
        "interface": draw(interfaces),
        "address": draw(addresses(version) | prefixes(version)),
        "port": draw(ports | port_ranges | st.just("*")),
    }
    return table | draw(st.fixed_dictionaries({}, optional=options))


@st.composite
def output_tables(draw: st.DrawFn, version: Version | None = None) -> Table:
    """An Output as a table; of the family given where it keeps the input's address or source."""
    ours: Version = draw(versions) if version is None else version
    source = st.ip_addresses(v=ours, network=hosts[ours]).map(str)
    options = {
        "ttl": st.integers(1, 255) | st.just("decrement"),
        "source": source | st.sampled_from(["egress", "keep"]),
        "dscp": st.integers(0, 63) | st.just("keep"),
    }
    table: Table = {
        "interface": draw(interfaces),
        "address": draw(addresses(ours) | st.just("*")),
        "port": draw(ports | st.just("*")),
    }
    return table | draw(st.fixed_dictionaries({}, optional=options))


_numbers = st.integers(1, 10**12)
healths = st.sampled_from(
    ["rtp,loss=1%", "auto", "sequence,offset=4,size=2", {"format": "mpegts", "silence": "off"}]
)
rates = st.one_of(
    _numbers.map(lambda n: f"{n}pps"),
    _numbers.map(lambda n: f"{n}bit/s"),
    st.builds("{}kpps, {}.5Mbit/s".format, st.integers(1, 10**6), st.integers(0, 10**5)),
)


@st.composite
def rule_tables(draw: st.DrawFn) -> Table:
    """A Rule as a table; loops are allowed, as what is generated may well be one."""
    origin = draw(input_tables())
    version: Version = 6 if ":" in origin["address"] else 4
    # Told apart by interface, so no two are the same.
    outputs = draw(st.lists(output_tables(version), min_size=1, max_size=4, unique_by=lambda t: t["interface"]))
    return {"name": draw(names), "from": origin, "to": outputs, "allow_loop": True} | draw(
        st.fixed_dictionaries({}, optional={"link_local": st.booleans(), "rate": rates, "health": healths})
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A whole config."""
    cores = st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True)
    relay = {
        "engine": st.sampled_from(["auto", "ebpf", "uring"]),
        "workers": st.just("auto") | st.integers(1, 64) | cores,
        "gro": st.just("auto") | st.booleans(),
        "socket_mode": st.sampled_from(["0600", "0666", "640"]),
        "listen": st.sampled_from(["127.0.0.1:8080", "[::1]:65535", "0.0.0.0:1024"]),
        "listen_names": st.lists(st.sampled_from(["relay.example.org", "a-b", "x_1"]), max_size=2).map(tuple),
        "socket_group": st.sampled_from(["adm", "video_ops", "ops-1"]),
        "flow_limit": st.integers(1, 1 << 20),
        "ring_slots": st.integers(8, 16).map(lambda bits: 1 << bits),
    }
    rules = draw(st.lists(rule_tables(), max_size=4, unique_by=lambda table: table["name"]))
    config = Config.model_validate({"relay": draw(st.fixed_dictionaries({}, optional=relay)), "rule": rules})
    assert not check_rules(config.rules)
    return config
