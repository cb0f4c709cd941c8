"""How messages travel between the three roles: the channel, and its one form on the wire.

Owns the encoding of messages.Message: JSON, `{"v":VERSION,"m":["Sync",7]}`, in one SOCK_SEQPACKET datagram. An
object is an array of its class's name and its fields' values; descriptors ride along by SCM_RIGHTS. Used by every
role. Standard library only, because the supervisor imports it. A message that does not decode is a bug or an
attack: `BadMessage`, and the receiver exits (the supervisor: ends the sender). `Channel.receive` blocks unless the
socket is non-blocking.
"""

import dataclasses
import functools
import itertools
import json
import operator
import os
import socket
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Final, Union

from mrelay.messages import VERSION, Message, PutRule, Refusal, Resource, RuleOutput, TapFilter

MAX_MESSAGE: Final = 128 * 1024  # bytes; below the default net.core.wmem_max, so a send never fails for size
MAX_FDS: Final = 64
SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h


class BadMessage(Exception):
    """What arrived is not a message of this version."""


_CLASSES: Final[dict[str, type]] = {
    c.__name__: c
    for c in (*typing.get_args(Message), *typing.get_args(Resource), Refusal, PutRule, RuleOutput, TapFilter)
}
_SENDABLE: Final = frozenset(typing.get_args(Message))
_NAMES: Final = {c: tuple(field.name for field in dataclasses.fields(c)) for c in _CLASSES.values()}
# What reads the name of an object's class, its fields, and the class again: with less there may be no tuple.
_PARTS: Final = {
    cls: operator.attrgetter("__class__.__name__", *names, "__class__") for cls, names in _NAMES.items()
}


def encode(message: Message) -> bytes:
    """One datagram's bytes."""
    return _ENCODER.encode({"v": VERSION, "m": message}).encode()


def _to_plain(value: Any) -> tuple[Any, ...]:
    """What json can't take by itself: a dataclass, as an array of its name and its fields."""
    return _PARTS[type(value)](value)[:-1]


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), default=_to_plain)


def decode(data: bytes) -> Message:
    """The message in one datagram; BadMessage when a name, a field or a type is not as declared."""
    try:
        top = json.loads(data)
        if not isinstance(top, dict) or top.get("v") != VERSION:
            raise BadMessage(f"not a message of version {VERSION}")
        message = _READ_MESSAGE(top.get("m"))
    except (ValueError, RecursionError) as error:
        raise BadMessage(str(error)) from error
    if type(message) not in _SENDABLE:
        raise BadMessage(f"{type(message).__name__} is not a message")
    return typing.cast(Message, message)


# Readers make a value of a declared type from plain JSON, strictly: no field more or less, no int for a bool or
# the other way round. There is one for each type, made once, for a start with many rules reads many messages.
_Reader = Callable[[Any], Any]


@functools.cache
def _reader(hint: Any) -> _Reader:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return _union_reader(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return _tuple_reader(_reader(typing.get_args(hint)[0]))
    if hint in _NAMES:
        return _object_reader(hint)
    return _plain_reader(hint)


def _plain_reader(cls: type) -> _Reader:
    def read(value: Any) -> Any:
        if type(value) is not cls:
            raise BadMessage(f"{cls.__name__} was due, not {value!r}")
        return value

    return read


def _tuple_reader(item: _Reader) -> _Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise BadMessage(f"a list was due, not {value!r}")
        return tuple(map(item, value))

    return read


def _union_reader(choices: tuple[Any, ...]) -> _Reader:
    objects = {cls.__name__: _reader(cls) for cls in choices if cls in _NAMES}
    plain = frozenset(choices)

    def read(value: Any) -> Any:
        if isinstance(value, list) and value and (read := objects.get(str(value[0]))):
            return read(value)
        if type(value) in plain:
            return value
        raise BadMessage(f"unexpected {value!r}")

    return read


def _object_reader(cls: Any) -> _Reader:
    hints = list(typing.get_type_hints(cls).values())
    if all(map(_is_plain, hints)):
        return _plain_object_reader(cls, hints)
    readers = [_reader(hint) for hint in hints]

    def read(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != 1 + len(readers) or value[0] != cls.__name__:
            raise BadMessage(f"not a {cls.__name__}: {value!r}")
        return cls(*[read(field) for read, field in zip(readers, value[1:], strict=True)])

    return read


def _is_plain(hint: Any) -> bool:
    return typing.get_origin(hint) is not tuple and set(_choices(hint)) <= {int, str, bool, types.NoneType}


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _plain_object_reader(cls: Any, hints: list[Any]) -> _Reader:
    """Most objects, and their types are compared at once."""
    right = frozenset(itertools.product((str,), *map(_choices, hints)))

    def read(value: Any) -> Any:
        if not isinstance(value, list) or tuple(map(type, value)) not in right or value[0] != cls.__name__:
            raise BadMessage(f"not a {cls.__name__}: {value!r}")
        return cls(*value[1:])

    return read


_READ_MESSAGE: Final = _reader(Message)


class Channel:
    """One end of a SOCK_SEQPACKET pair. Owns its socket.

    With `takes_fds` false a message that carries descriptors is a BadMessage, and none is ever ours.
    """

    def __init__(self, sock: socket.socket, *, takes_fds: bool = True) -> None:
        self.sock = sock
        self._room = socket.CMSG_SPACE(MAX_FDS * 4) if takes_fds else 0
        try:  # room for every message of a start-up at once; only the supervisor may exceed the sysctl
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 20)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, fds: typing.Sequence[int] = ()) -> None:
        """Send one message; OSError (EPIPE, EAGAIN on a full non-blocking channel) is the caller's."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _pack_fds(fds))] if fds else []
        self.sock.sendmsg([encode(message)], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and the descriptors with it (now ours); None when the peer is gone.

        BlockingIOError when there is none on a non-blocking channel. BadMessage closes its descriptors.
        """
        data, ancillary, flags, _ = self.sock.recvmsg(MAX_MESSAGE, self._room, socket.MSG_CMSG_CLOEXEC)
        fds = _unpack_fds(ancillary)
        if not data and not fds and not flags & socket.MSG_CTRUNC:
            return None
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise BadMessage("truncated")
            return decode(data), fds
        except BadMessage:
            for fd in fds:
                os.close(fd)
            raise

    def close(self) -> None:
        self.sock.close()


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, to be given away or wrapped in a Channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _pack_fds(fds: typing.Sequence[int]) -> bytes:
    return b"".join(fd.to_bytes(4, "little" if _LITTLE else "big") for fd in fds)


def _unpack_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % 4
            found += memoryview(data[:whole]).cast("i").tolist()
    return found


_LITTLE: Final = sys.byteorder == "little"
