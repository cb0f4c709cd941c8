"""The roles' messages: what goes in comes out, and nothing else does."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from descriptors import none_leaks
from mrelay.messages import (
    AT_ONCE,
    VERSION,
    Grant,
    JoinGroup,
    LogLevel,
    OpenEgress,
    Outcome,
    PutMore,
    PutRule,
    PutRules,
    Refusal,
    RuleOutput,
    Setup,
    Status,
    Stop,
    Sync,
    WorkerUp,
    joined,
    rule_messages,
)
from mrelay.wire import MAX_MESSAGE, BadMessage, Channel, channel_pair, decode, encode

RULE = PutRule(
    1, 2, 0, 6, 2**127, 2**128 - 1, 1, 2, 3, 4, 5, 6, (7,), (RuleOutput(0, 1, 2, None, None, 0, -1, True),)
)
LONG = RuleOutput(
    (1 << 31) - 1, (1 << 31) - 1, (1 << 31) - 1, "ff3e:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535, 255, 63, False
)
EXAMPLES = [
    Grant(1, (JoinGroup(3, "239.1.1.1", None), OpenEgress(4, 3, 6, "ff3e::1", 5000, "keep", 0))),
    Outcome(1, (Refusal(1, 99, "no such address", "add it"),)),
    Setup(None, "/var/lib/mrelay", "auto", None, 0, False),
    PutRules((RULE, RULE)),
    PutMore(7, RULE.own, RULE.outputs),
    WorkerUp(0, 1, 2, 3, 4),
    Stop(),
    LogLevel("worker", "debug"),
    Status("1 of 2 rules up"),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Stop) -> None:
    assert decode(encode(message)) == message


LENGTHS = st.integers(0, 300) | st.integers(0, 3000)


@given(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=70))
@example([(3, 2), (3000, 0), (0, 3000), (129, 128), (3, 2)])
def test_rules_in_parts_are_the_same_rules_and_fit_into_messages(lengths: list[tuple[int, int]]) -> None:
    rules = [
        replace(RULE, rule=slot, own=(2**128 - 1,) * own, outputs=(LONG,) * outputs)
        for slot, (own, outputs) in enumerate(lengths)
    ]
    put: dict[int, PutRule] = {}
    for message in rule_messages(rules):
        assert len(encode(message)) <= MAX_MESSAGE
        if isinstance(message, PutRules):
            assert 0 < len(message.what) <= AT_ONCE
            put |= {rule.rule: rule for rule in message.what}
        else:
            put[message.rule] = joined(put[message.rule], message)
    assert list(put.values()) == rules


@given(st.binary(max_size=200))
def test_other_bytes_are_bad_messages(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_other_json_is_a_bad_message(value: object) -> None:
    with pytest.raises(BadMessage):
        decode(json.dumps({"v": VERSION, "m": value}).encode())


@pytest.mark.parametrize(
    "plain",
    [
        {"t": "Sync", "id": 1},
        "Stop",
        [],
        [["Sync", 1]],
        ["Sync"],
        ["Sync", "1"],
        ["Sync", True],
        ["Sync", 1.0],
        ["Sync", None],
        ["Sync", 1, 2],
        ["RuleOutput", 0, 1, 2, None, None, 0, -1, True],
        ["JoinGroup", 3, "239.1.1.1", None],
        ["Grant", 1, ["JoinGroup", 3, "239.1.1.1", None]],
        ["Grant", 1, [["JoinGroup", 3, "239.1.1.1", 1]]],
        ["Grant", 1, [["Stop"]]],
        ["Grant", 1, [["Refusal", 0, 0, "", ""]]],
    ],
)
def test_near_misses_are_refused(plain: object) -> None:
    with pytest.raises(BadMessage):
        decode(json.dumps({"v": VERSION, "m": plain}).encode())


def test_another_version_is_refused() -> None:
    with pytest.raises(BadMessage, match="version"):
        decode(b'{"v":1,"m":["Stop"]}')


def test_descriptors_go_along_and_a_bad_message_leaks_none() -> None:
    a, b = channel_pair()
    sender, receiver = Channel(a), Channel(b)
    sender.send(Sync(1), [0, 1])
    got = receiver.receive()
    assert got is not None
    message, fds = got
    assert (message, len(fds)) == (Sync(1), 2)
    for fd in fds:
        os.close(fd)
    with none_leaks(), pytest.raises(BadMessage):
        a.sendmsg([b"nonsense"], [(1, 1, (0).to_bytes(4, "little"))])
        receiver.receive()
    sender.close()
    assert receiver.receive() is None
    receiver.close()


def test_an_empty_datagram_with_descriptors_leaks_none() -> None:
    a, b = channel_pair()
    receiver = Channel(b)
    with none_leaks(), pytest.raises(BadMessage):
        a.sendmsg([b""], [(1, 1, (0).to_bytes(4, "little"))])
        receiver.receive()
    a.close()
    assert receiver.receive() is None
    receiver.close()
