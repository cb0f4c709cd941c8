"""The one TCP socket that the supervisor opens: what it refuses, and that there is no other."""

import errno
import socket

import pytest

from mrelay.supervisor.resources import Refused
from mrelay.supervisor.tcp import TcpListener


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("address", "port"),
    [
        *(("127.0.0.1", port) for port in (0, -1, 80, 1023, 65536, 1 << 70)),
        *((address, 8080) for address in ("", "localhost", "\0", "\ud800", "239.1.1.1", "ff02::1", "fe80::1%lo")),
        *((address, 8080) for address in ("127.1", "0:0::1", "::FFFF", "127.0.0.1 ", "/run/x", "a" * 5000)),
    ],
)
def test_what_is_no_place_to_listen(address: str, port: int) -> None:
    listener = TcpListener()
    with pytest.raises(Refused):
        listener.open(address, port, starting=True)
    assert listener.sock is None


def test_not_after_the_start() -> None:
    listener = TcpListener()
    with pytest.raises(Refused, match="without a TCP listener"):
        listener.open("127.0.0.1", free_port(), starting=False)
    assert listener.sock is None


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_same_again_and_nothing_else(address: str) -> None:
    listener, port = TcpListener(), free_port()
    listener.open(address, port, starting=True)
    first = listener.sock
    assert first is not None
    with first:
        listener.open(address, port, starting=False)
        assert listener.sock is first
        for other in ((address, port + 1), ("0.0.0.0", port)):
            with pytest.raises(Refused, match="can't be changed"):
                listener.open(*other, starting=True)
        with socket.create_connection((address, port)) as client:
            accepted, _ = first.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"


def test_what_can_not_be_had_now_may_be_had_later() -> None:
    listener = TcpListener()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use") as caught:
            listener.open("127.0.0.1", port, starting=True)
        assert caught.value.errno == errno.EADDRINUSE
    listener.open("127.0.0.1", port, starting=False)
    assert listener.sock is not None
    listener.sock.close()
