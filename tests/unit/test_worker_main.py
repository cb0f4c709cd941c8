"""A worker's loop without rings: what it makes of the messages it gets."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from mrelay.messages import (
    Commit,
    Committed,
    DropRules,
    Message,
    PutMore,
    PutRule,
    PutRules,
    RuleOutput,
    Sync,
    Synced,
    WorkerSetup,
)
from mrelay.model.ruleset import rules_digest
from mrelay.pulse import Pulse
from mrelay.supervisor.children import new_counters, shared_memory
from mrelay.wire import BadMessage, Channel, channel_pair
from mrelay.worker.main import Worker
from mrelay.worker.messages import MessageTable, MmsgSender

FLOWS = 64


def rule(slot: int, port: int = 5000) -> PutRule:
    output = RuleOutput(0, 1, 2, None, None, 0, -1, False)
    return PutRule(slot, 1, 0, 4, 9, 9, port, port, 0, 2**32 - 1, 0, 0, (), (output,))


@dataclass
class Scene:
    """A worker, and the other ends of its channels."""

    worker: Worker
    supervisor: Channel
    control: Channel
    pulse: int

    def tell(self, *messages: Message) -> list[Message]:
        """Control says this; what the worker answers."""
        for message in messages:
            self.control.send(message)
        assert self.worker.control is not None
        self.worker._drain(self.worker.control)
        found: list[Message] = []
        while True:
            try:
                got = self.control.receive()
            except BlockingIOError:
                return found
            assert got is not None
            found.append(got[0])

    def new_control(self) -> None:
        """As when control was restarted: another channel comes from the supervisor."""
        ours, theirs = channel_pair()
        ours.setblocking(False)
        self.supervisor.send(WorkerSetup(0, 0, FLOWS, 0), [theirs.fileno(), os.memfd_create("counters")])
        theirs.close()
        self.worker._drain(self.worker.supervisor)
        self.control = Channel(ours)

    def beats(self) -> int:
        return int.from_bytes(os.pread(self.pulse, 8, 0), "little")


@pytest.fixture
def scene() -> Iterator[Scene]:
    (supervisor, its_supervisor), (control, its_control) = channel_pair(), channel_pair()
    for sock in (supervisor, its_supervisor, control):
        sock.setblocking(False)
    memory = new_counters(FLOWS)
    pulse = shared_memory("pulse", os.sysconf("SC_PAGESIZE"))
    worker = Worker(
        Channel(its_supervisor),
        WorkerSetup(0, 0, FLOWS, 0),
        [its_control.detach(), memory],
        MmsgSender(MessageTable()),
        Pulse(os.dup(pulse)),
    )
    yield Scene(worker, Channel(supervisor), Channel(control), pulse)
    for sock in (supervisor, its_supervisor):
        sock.close()


def put(*rules: PutRule) -> PutRules:
    return PutRules(rules)


def digest(*rules: PutRule) -> int:
    return rules_digest(rules)


def test_it_says_the_digest_of_what_is_in_force(scene: Scene) -> None:
    assert scene.tell(put(rule(0), rule(1)), Sync(7)) == [Synced(7, 0, digest())]
    assert scene.tell(Commit(1, True)) == [Committed(1, "sendmmsg", digest(rule(0), rule(1)))]
    assert scene.tell(DropRules((0,)), put(rule(1, 6000)), Commit(2, False)) == [
        Committed(2, "sendmmsg", digest(rule(1, 6000)))
    ]
    assert scene.tell(Sync(8)) == [Synced(8, 2, digest(rule(1, 6000)))]


def test_a_whole_commit_drops_what_it_does_not_say(scene: Scene) -> None:
    scene.tell(put(rule(0), rule(1)), Commit(1, True))
    assert scene.tell(put(rule(2)), Commit(2, False)) == [
        Committed(2, "sendmmsg", digest(rule(0), rule(1), rule(2)))
    ]
    assert scene.tell(put(rule(1)), Commit(3, True)) == [Committed(3, "sendmmsg", digest(rule(1)))]


def test_a_rule_set_that_drifted_shows_and_a_whole_commit_mends_it(scene: Scene) -> None:
    scene.tell(put(rule(0), rule(1)), Commit(1, True))
    scene.worker.rules.drop(0)
    assert scene.tell(Sync(1)) == [Synced(1, 1, digest(rule(1)))]
    assert scene.tell(put(rule(0), rule(1)), Commit(2, True)) == [
        Committed(2, "sendmmsg", digest(rule(0), rule(1)))
    ]


def test_a_new_control_s_first_commit_is_not_taken_for_the_old_one_s(scene: Scene) -> None:
    scene.tell(put(rule(0)), Commit(1, True))
    scene.new_control()
    assert scene.tell(Sync(1)) == [Synced(1, 0, digest(rule(0)))], "rules stay in force, of no Commit of its"
    assert scene.tell(put(rule(1)), Commit(1, True)) == [Committed(1, "sendmmsg", digest(rule(1)))]


def test_long_lists_of_rules_do_not_look_like_a_hang(scene: Scene) -> None:
    before = scene.beats()
    scene.tell(*(put(rule(slot)) for slot in range(100)))
    assert scene.beats() - before >= 100


def test_control_s_messages_take_turns_with_the_rings(scene: Scene) -> None:
    for slot in range(10):
        scene.control.send(put(rule(slot)))
    assert scene.worker.control is not None
    scene.worker._drain(scene.worker.control, 4)
    assert sorted(scene.worker._incoming) == [0, 1, 2, 3]


def test_the_end_of_the_supervisor_is_its_own(scene: Scene) -> None:
    scene.supervisor.close()
    with pytest.raises(SystemExit):
        scene.worker._drain(scene.worker.supervisor)


def test_a_rule_comes_in_several_messages(scene: Scene) -> None:
    whole = replace(rule(0), own=(7, 8), outputs=rule(0).outputs * 2)
    more = PutMore(0, (8,), rule(0).outputs)
    assert scene.tell(put(replace(whole, own=(7,), outputs=rule(0).outputs)), more, Commit(1, True)) == [
        Committed(1, "sendmmsg", digest(whole))
    ]


def test_more_of_a_rule_that_was_not_put_ends_it(scene: Scene) -> None:
    scene.tell(put(rule(0)), Commit(1, True))
    with pytest.raises(BadMessage, match="more of rule 0"):
        scene.tell(PutMore(0, (8,), ()))


def test_a_message_that_is_not_for_it_ends_it(scene: Scene) -> None:
    with pytest.raises(BadMessage):
        scene.tell(Synced(1, 1, 1))


def test_nothing_is_said_to_a_control_that_is_gone(scene: Scene) -> None:
    scene.tell(put(rule(0)), Commit(1, True))
    assert isinstance(scene.control.sock, socket.socket)
    scene.control.close()
    assert scene.worker.control is not None
    scene.worker._drain(scene.worker.control)
    assert scene.worker.control is None
    assert [r.rule for r in scene.worker.rules] == [0], "it goes on by the rules it has"
