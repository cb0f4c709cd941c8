"""A message channel in the event loop: sends are queued, what arrives is called back.

Owns the descriptor of one wire.Channel. Used for the supervisor and for each worker. Nothing here
blocks: what the kernel's buffer has no room for waits in a queue, which is bounded by the rules there are.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from socket import socket

from mrelay.messages import Message
from mrelay.wire import BadMessage, Channel

OnMessage = Callable[[Message, list[int]], None]
OnEnd = Callable[[BadMessage | None], None]


class AsyncChannel:
    """`on_message` gets each message with its descriptors, and may raise BadMessage to refuse it.

    `on_end` is called once: with None when the peer is gone, with the BadMessage when it sent one.
    `takes_fds` as in wire.Channel.
    """

    def __init__(self, sock: socket, on_message: OnMessage, on_end: OnEnd, *, takes_fds: bool = True) -> None:
        sock.setblocking(False)
        self._channel = Channel(sock, takes_fds=takes_fds)
        self._on_message, self._on_end = on_message, on_end
        self._queue: deque[Message] = deque()
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(sock, self._readable)

    def send(self, message: Message) -> None:
        """Send, in order, as soon as there is room; nothing once the peer is gone, which on_end tells."""
        if not self._open:
            return
        self._queue.append(message)
        if len(self._queue) == 1:
            self._flush()
            if self._queue:
                self._loop.add_writer(self._channel, self._flush)

    def _flush(self) -> None:
        try:
            while self._queue:
                self._channel.send(self._queue[0])
                self._queue.popleft()
        except BlockingIOError:
            return
        except OSError:  # the peer is gone: reading tells, after what it said last
            self._queue.clear()
        self._loop.remove_writer(self._channel)

    def _readable(self) -> None:
        try:
            while self._open:
                got = self._channel.receive()
                if got is None:
                    return self._end(None)
                self._on_message(*got)
        except BlockingIOError:
            return None
        except ConnectionError:
            return self._end(None)
        except BadMessage as error:
            return self._end(error)

    def _end(self, error: BadMessage | None) -> None:
        self.close()
        self._on_end(error)

    def close(self) -> None:
        """Let go of the descriptor; on_end is not called."""
        if self._open:
            self._open = False
            self._queue.clear()
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
            self._channel.close()
