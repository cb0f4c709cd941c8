"""peers.toml, read and checked: which relays there are, what each can do, their command lines and files.

Pure but for reading that file and looking for commands in PATH. relays.py starts what is rendered here.
"""

import shlex
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from jinja2 import Environment, StrictUndefined, TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import lab as labs
from cases import OUT_GROUP, OUT_PORT, PORT, SECTIONS, Case, Section, prefix
from traffic import Flow

FILE: Final = Path(__file__).with_name("peers.toml")
_jinja = Environment(  # noqa: S701  command lines and config files, no HTML
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


class PeersError(ValueError):
    """peers.toml is wrong; says where and how to mend it."""


class Request(BaseModel):
    """Over HTTP on a Unix socket."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: Literal["POST", "PUT"] = "POST"
    socket: str
    path: str
    body: str


class Peer(BaseModel):
    """One relay; peers.toml says what each key means."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    needs: tuple[str, ...] = ()
    package: str = ""
    version: str = ""
    command: str
    files: dict[str, str] = {}
    ready: str
    reload: str = ""
    halt: str = ""
    add: str | Request = ""
    put: Request | None = None
    drops: str = ""
    merges: Literal["itself", "bench", "no"] = "no"
    df: bool = True
    joins: bool = False
    hosts: bool = False
    rules: bool = False
    most_outputs: int = Field(1, ge=1)
    most_flows: int = Field(1, ge=1)
    most_workers: int = Field(1, ge=1)
    sections: tuple[str, ...] = tuple(section.name for section in SECTIONS)
    quick: bool = True
    io_uring: bool = True
    ours: bool = False
    settings: dict[str, str | int | bool] = {}

    @field_validator("sections")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = [section.name for section in SECTIONS]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no section {unknown}; there are: {', '.join(known)}")
        return names

    def missing(self) -> str:
        """Why it can't be measured here; empty when it can."""
        absent = [command for command in self.needs if not shutil.which(command)]
        if not absent:
            return ""
        return f"{' '.join(absent)} not installed" + (
            f"; remedy: apt-get install {self.package}" if self.package else ""
        )

    def can(self, section: Section, case: Case) -> bool:
        """Whether it takes part in a case of a section."""
        return (
            section.name in self.sections
            and case.outputs <= self.most_outputs
            and case.flows <= self.most_flows
            and case.workers <= self.most_workers
            and (self.df or not case.df)
            and (self.merges != "bench" or case.merge)
            and (self.hosts or not case.hosts)
            and (self.rules or section.name != "rules")
            and (bool(self.reload) or section.measure != "changes")
        )

    def command_line(self, variables: Mapping[str, Any]) -> list[str]:
        """The words of `command`."""
        return shlex.split(render(self.command, variables))

    def check(self) -> None:
        """Render everything once, for a case that has a bit of all. PeersError names what does not."""
        variables = context(self, Case(), Path("/tmp/x"), [1])  # noqa: S108  nothing is written there
        texts = {
            "command": self.command,
            "ready": self.ready,
            "reload": self.reload,
            "drops": self.drops,
            "halt": self.halt,
        }
        texts |= {"version": self.version, **{f"files.{name}": text for name, text in self.files.items()}}
        for at, text in (texts | _texts("add", self.add) | _texts("put", self.put)).items():
            try:
                render(text, variables)
            except TemplateError as error:
                raise PeersError(
                    f"{self.name}: {at}: {error}; variables: {', '.join(sorted(variables))}"
                ) from error


def _texts(at: str, ask: str | Request | None) -> dict[str, str]:
    """Its templates, by where they stand."""
    if isinstance(ask, Request):
        return {f"{at}.{name}": text for name, text in ask.model_dump().items()}
    return {at: ask or ""}


def render(template: str, variables: Mapping[str, Any]) -> str:
    """TemplateError for a variable that there isn't."""
    return _jinja.from_string(template).render(variables)


def context(peer: Peer, case: Case, directory: Path, workers: Sequence[int]) -> dict[str, Any]:
    """The variables of all templates."""
    flows = case.traffic()
    return {
        "iif": "r0",
        "iif_address": labs.INGRESS_ADDRESS,
        "oifs": [f"r{i}" for i in range(1, case.outputs + 1)],
        "oif_addresses": [labs.egress_address(i) for i in range(1, case.outputs + 1)],
        "flows": flows,
        "prefix": prefix(flows),
        **adding(0),
        "out_group": OUT_GROUP,
        "out_port": OUT_PORT,
        "hosts": [f"10.201.{n // 250}.{n % 250 + 1}" for n in range(case.hosts)],
        "rules": case.rules,
        "busy": case.busy,
        "merge": case.merge,
        "workers": list(workers),
        "directory": directory,
        "python": sys.executable,
        "settings": peer.settings,
    }


def adding(number: int) -> dict[str, Any]:
    """The variables of a flow to add: 239.9.9.0 and on."""
    return {"number": number, "new": Flow(labs.SOURCE_ADDRESS, f"239.9.9.{number}", PORT)}


def load(file: Path = FILE) -> list[Peer]:
    """All peers in the file's order. PeersError with everything that is wrong with the first bad one."""
    try:
        tables = tomllib.loads(file.read_text())["peer"]
    except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
        raise PeersError(
            f"{file}: {error!r}; it wants [[peer]] tables, see the comment in bench/peers.toml"
        ) from error
    found: dict[str, Peer] = {}
    whole: dict[str, dict[str, Any]] = {}
    for table in tables:
        peer, merged = _peer(file, table, whole)
        if peer.name in found:
            raise PeersError(f"{file}: two peers are called {peer.name!r}; give one another name")
        found[peer.name], whole[peer.name] = peer, merged
    return list(found.values())


def _peer(file: Path, table: dict[str, Any], whole: dict[str, dict[str, Any]]) -> tuple[Peer, dict[str, Any]]:
    own, like = dict(table), table.get("like")
    own.pop("like", None)
    name = own.get("name", "a peer without name")
    if like is not None and like not in whole:
        raise PeersError(
            f"{file}: {name}: like = {like!r}: there is no such peer further up; there: {sorted(whole)}"
        )
    merged = {**whole.get(like or "", {}), **own}
    try:
        peer = Peer.model_validate(merged)
        peer.check()
    except ValidationError as error:
        errors = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise PeersError(f"{file}: {name}: {errors}") from error
    return peer, merged
