"""A whole control process in a test's own process: its API on a real Unix socket, a fake supervisor before it."""

import asyncio
import http.client
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fake_roles import FakeSupervisor, until
from mrelay.control.main import Control
from mrelay.control.state import NAME
from mrelay.messages import Held, Reload, Resource, Setup, Stop, parts

# Interfaces that every host has, and one that none has.
RULE_A = {"name": "a", "from": "lo:239.1.1.1:5000", "to": ["lo:239.2.2.2:6000"]}
RULE_B = {"name": "b", "from": "lo:239.1.1.2:5000-5001,vlan=7", "to": ["lo:*:*,ttl=8", "eth9:*:*"]}
CONFIG_A = '[[rule]]\nname = "a"\nfrom = "lo:239.1.1.1:5000"\nto = ["lo:239.2.2.2:6000"]\n'
STATES = {"link_local": False, "allow_loop": False, "rate": None, "health": None, "state": "up"}
VIEW_A = {**RULE_A, **STATES, "outputs": [{"to": "lo:239.2.2.2:6000", "state": "up"}]}


class Answer(NamedTuple):
    status: int
    body: Any


class Client:
    """Asks the API, in a thread, since both ends are in this process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __call__(self, method: str, path: str, body: object = None) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        return await asyncio.to_thread(self.ask, method, path, data)

    def send(self, method: str, path: str, data: bytes | None) -> http.client.HTTPConnection:
        """A request that nobody waits for yet."""
        connection = http.client.HTTPConnection("relay")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self._path))
        connection.request(method, path, data, {"content-type": "application/json"})
        return connection

    def ask(self, method: str, path: str, data: bytes | None) -> Answer:
        connection = self.send(method, path, data)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        plain = not answer.getheader("content-type", "").startswith("application/json")
        return Answer(answer.status, text.decode() if plain else json.loads(text))


class Scene:
    """A control process with a fake supervisor, in a directory of its own."""

    def __init__(self, directory: Path, config: str | None = None, held: tuple[Resource, ...] = ()) -> None:
        self.fake = FakeSupervisor(held=set(held))
        self._directory, self._config, self._held = directory, config, held
        listener = socket.socket(socket.AF_UNIX)
        (directory / "sock").unlink(missing_ok=True)
        listener.bind(str(directory / "sock"))
        listener.listen()
        self.fake.listener = listener.detach()
        self.api = Client(directory / "sock")

    async def start(self, *, restarted: bool = False, workers: str | None = "1") -> "asyncio.Task[int]":
        """Set control up; its life, as a task."""
        fds = [os.open(self._directory, os.O_RDONLY)]
        name = None
        if self._config is not None:
            name = "relay.toml"
            fds.append(self.config_fd(self._config))
        self.fake.channel.send(Setup(name, "state", None, workers, len(self._held), restarted), fds)
        for part in parts(self._held):
            self.fake.channel.send(Held(part))
        return asyncio.create_task(Control(self.fake.theirs, lambda _: 0).serve())

    def config_fd(self, text: str) -> int:
        fd = os.memfd_create("config")
        os.write(fd, text.encode())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def reload(self, text: str) -> None:
        """As SIGHUP does it."""
        self.fake.channel.send(Reload(""), [self.config_fd(text)])

    def saved(self) -> Any:
        """The state file."""
        return json.loads((self._directory / NAME).read_text())

    async def names(self) -> list[str]:
        answer = await self.api("GET", "/v1/rules")
        return [rule["name"] for rule in answer.body["rules"]]

    async def until_names(self, *names: str) -> None:
        while await self.names() != list(names):
            await asyncio.sleep(0)


@asynccontextmanager
async def relay(
    directory: Path, config: str | None = None, *, restarted: bool = False, held: tuple[Resource, ...] = ()
) -> AsyncIterator[Scene]:
    """A control process that is ready; told to stop at the end."""
    it = Scene(directory, config, held)
    life = await it.start(restarted=restarted)
    await until(lambda: bool(it.fake.said("ready")))
    yield it
    it.fake.channel.send(Stop())
    assert await life == 0
