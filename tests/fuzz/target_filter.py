"""Group filters for any ranges: what the kernel takes, exact when they fit, never less than was asked."""

from bpf_machine import V4_MAX, V6_MAX, edges, inside, run, well_formed
from fuzz.data import Data
from mrelay.kernel import cbpf
from mrelay.kernel.cbpf import BPF_MAXINSNS, Range, group_filter

WORDS = [0, 1, 0x7FFFFFFF, 0x80000000, 0xE0000000, 0xFF3E0000, 0xFFFFFFFE, 0xFFFFFFFF]


def check(data: bytes) -> None:
    choices = Data(data)
    limit = choices.pick([BPF_MAXINSNS, BPF_MAXINSNS, 64, 200])
    v4, v6 = _ranges(choices, 1), _ranges(choices, 4)
    program = group_filter(v4, v6, limit)
    well_formed(program)
    assert len(program) <= limit
    exact = limit == BPF_MAXINSNS
    for ethertype, ranges, most in ((cbpf.ETH_P_IP, v4, V4_MAX), (cbpf.ETH_P_IPV6, v6, V6_MAX)):
        for value in edges(ranges, most):
            accepted, wanted = run(program, ethertype, value) == cbpf.ACCEPT, inside(ranges, value)
            assert accepted == wanted if exact else accepted >= wanted
    assert run(program, choices.pick([0x0806, 0x86DE, 0]), 0) == cbpf.DROP


def _ranges(choices: Data, words: int) -> list[Range]:
    pairs = [(_value(choices, words), _value(choices, words)) for _ in range(choices.below(20))]
    return [(min(pair), max(pair)) for pair in pairs]


def _value(choices: Data, words: int) -> int:
    value = 0
    for _ in range(words):
        value = value << 32 | choices.pick([*WORDS, choices.integer(4)])
    return value
