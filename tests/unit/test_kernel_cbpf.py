"""The group filter against a plain membership check: in a small interpreter, and in the kernel."""

import random
import select
import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf_machine import V4_MAX, V6_MAX, edges, inside, run, well_formed
from mrelay.kernel import cbpf
from mrelay.kernel.cbpf import Insn, Range, group_filter


def ranges_up_to(maximum: int) -> st.SearchStrategy[list[Range]]:
    near = st.builds(lambda at, step: min(maximum, at + step), st.integers(0, maximum), st.integers(0, 3))
    value = st.one_of(st.integers(0, maximum), st.integers(0, 9), st.integers(maximum - 9, maximum), near)
    words = st.lists(st.sampled_from([0, 1, 0xFFFFFFFF, 0xFF3E0000]), min_size=4, max_size=4)
    built = st.builds(lambda w: sum(x << 32 * i for i, x in enumerate(w)) & maximum, words)
    pair = st.tuples(value | built, value | built)
    return st.lists(pair.map(lambda p: (min(p), max(p))), max_size=12)


@given(ranges_up_to(V4_MAX), ranges_up_to(V6_MAX), st.integers(0, V4_MAX), st.integers(0, V6_MAX))
def test_accepts_exactly_the_ranges(v4: list[Range], v6: list[Range], any4: int, any6: int) -> None:
    program = group_filter(v4, v6)
    well_formed(program)
    for value in [any4, *edges(v4, V4_MAX)]:
        assert (run(program, cbpf.ETH_P_IP, value) == cbpf.ACCEPT) is inside(v4, value)
    for value in [any6, *edges(v6, V6_MAX)]:
        assert (run(program, cbpf.ETH_P_IPV6, value) == cbpf.ACCEPT) is inside(v6, value)
    assert run(program, 0x0806, 0) == cbpf.DROP


@given(ranges_up_to(V4_MAX), ranges_up_to(V6_MAX))
def test_a_coarse_program_fits_and_drops_nothing_wanted(v4: list[Range], v6: list[Range]) -> None:
    program = group_filter(v4, v6, limit=64)
    well_formed(program)
    assert len(program) <= 64
    for low, high in v4:
        assert run(program, cbpf.ETH_P_IP, low) == run(program, cbpf.ETH_P_IP, high) == cbpf.ACCEPT
    for low, high in v6:
        assert run(program, cbpf.ETH_P_IPV6, low) == run(program, cbpf.ETH_P_IPV6, high) == cbpf.ACCEPT


def random_groups(count: int, seed: int) -> tuple[list[Range], list[Range]]:
    """IPv4 groups anywhere in 224.0.0.0/4, and a tenth as many IPv6 groups."""
    rng = random.Random(seed)
    v4 = [rng.randrange(0xE0000000, 0xF0000000) for _ in range(count)]
    v6 = [0xFF3E << 112 | rng.getrandbits(112) for _ in range(count // 10)]
    return [(group, group) for group in v4], [(group, group) for group in v6]


def test_500_groups_are_exact() -> None:
    v4, v6 = random_groups(500, 1)
    program = group_filter(v4, v6)
    well_formed(program)
    for value in edges(v4, V4_MAX):
        assert (run(program, cbpf.ETH_P_IP, value) == cbpf.ACCEPT) is inside(v4, value)
    for value in edges(v6, V6_MAX):
        assert (run(program, cbpf.ETH_P_IPV6, value) == cbpf.ACCEPT) is inside(v6, value)


def test_5000_groups_are_coarsened_yet_still_filter() -> None:
    v4, v6 = random_groups(5000, 2)
    program = group_filter(v4, v6)
    well_formed(program)
    assert cbpf.BPF_MAXINSNS // 2 < len(program) <= cbpf.BPF_MAXINSNS
    assert all(run(program, cbpf.ETH_P_IP, low) == cbpf.ACCEPT for low, _ in v4)
    assert all(run(program, cbpf.ETH_P_IPV6, low) == cbpf.ACCEPT for low, _ in v6)
    strangers, _ = random_groups(2000, 3)
    let_in = sum(run(program, cbpf.ETH_P_IP, low) == cbpf.ACCEPT for low, _ in strangers)
    assert let_in < len(strangers) // 2


def test_nothing_wanted_is_nothing_accepted() -> None:
    program = group_filter([], [])
    assert run(program, cbpf.ETH_P_IP, 0xE0000001) == run(program, cbpf.ETH_P_IPV6, 1) == cbpf.DROP


def test_everything_wanted_needs_no_search() -> None:
    assert len(group_filter([(0, V4_MAX)], [(0, V6_MAX)])) <= 6


@pytest.mark.parametrize("count", [1, 500, 5000])
def test_the_kernel_agrees(count: int) -> None:
    """Loopback answers for all of 127.0.0.0/8, so a UDP socket can judge destinations without privilege."""
    rng = random.Random(count)
    chosen = [rng.randrange(0x7F000002, 0x7FFFFFFE) for _ in range(count)]
    ranges = cbpf.merge((low, low + rng.randrange(3)) for low in chosen)
    program = group_filter(ranges, [])
    probes = [at + step for at in rng.sample(chosen, min(count, 150)) for step in (-1, 0, 3)]
    want = [value for value in probes if run(program, cbpf.ETH_P_IP, value) == cbpf.ACCEPT]
    assert delivered(program, probes) == want


def delivered(program: list[Insn], destinations: list[int]) -> list[int]:
    """The loopback destinations, in order, whose datagrams pass the program in the kernel."""
    received = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        cbpf.attach(sink, program)
        sink.bind(("0.0.0.0", 0))
        sink.setblocking(False)
        port = sink.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
            for destination in destinations:
                source.sendto(destination.to_bytes(4, "big"), (str(ip_address(destination)), port))
                if select.select([sink], [], [], 0)[0]:  # loopback delivers within sendto
                    received.append(int.from_bytes(sink.recv(4), "big"))
    return received


def test_attach_replaces_and_refuses_nonsense() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        cbpf.attach(sock, cbpf.DROP_ALL)
        cbpf.attach_group_filter(sock, *random_groups(5000, 4))
        with pytest.raises(OSError, match="Invalid argument"):
            cbpf.attach(sock, [cbpf.load(0)])
