"""Requests that the API's own OpenAPI document leads Schemathesis to: documented answers of documented shape.

A whole control process with fake supervisor and worker answers, on loopback. FUZZ_EXAMPLES (default 15) is how
many requests each operation gets; `make fuzz` asks for more.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from control_scene import Scene
from fake_roles import until
from mrelay.control import server
from mrelay.control.api import create_app
from mrelay.control.peers import Peer
from mrelay.control.relay import Relay
from mrelay.messages import Stop

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))


def not_a_bug(context: Any, response: Any, case: "schemathesis.Case[Any]") -> bool | None:
    """A 503 is an answer like others where it is documented: the fake supervisor opens no tap on a host's eth0."""
    return None if response.status_code == 503 else not_a_server_error(context, response, case)


CHECKS = [
    not_a_bug,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


class Control(threading.Thread):
    """The control process in a thread of its own, until `stop`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self._directory, self.ready, self._stopping = directory, threading.Event(), threading.Event()
        listener = socket.create_server(("127.0.0.1", 0))
        self.url, self._listener = f"http://127.0.0.1:{listener.getsockname()[1]}", listener.detach()

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        scene = Scene(self._directory)
        os.close(scene.fake.listener or 0)
        scene.fake.listener = self._listener
        life = await scene.start()
        await until(lambda: bool(scene.fake.said("ready")))
        self.ready.set()
        await asyncio.to_thread(self._stopping.wait)
        scene.fake.channel.send(Stop())
        await life

    def stop(self) -> None:
        self._stopping.set()
        self.join(20)
        assert not self.is_alive()


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    with pytest.MonkeyPatch.context() as patch:
        # A TCP connection has no peer's credentials; these are of one who may do everything.
        patch.setattr(server, "peer_of", lambda _: Peer(1, 0, frozenset({0})))
        made = Control(tmp_path_factory.mktemp("api"))
        made.start()
        assert made.ready.wait(20)
        yield made
        made.stop()


application = create_app(cast(Relay, None))  # its document asks no relay
# A request to stop is for a relay that can be spared (tests/netns); a stream of events has no end.
schema = schemathesis.openapi.from_dict(application.openapi()).exclude(path=["/v1/stop", "/v1/events/stream"])


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_answers_are_as_documented(case: "schemathesis.Case[Any]", control: Control) -> None:
    case.call_and_validate(base_url=control.url, checks=CHECKS)
