"""The config file: settings under [relay], one [[rule]] per rule.

Owns reading it with all errors at once and writing rules back with the operator's comments kept.
Called by the control role and the CLI, which read and write the file itself. Nothing here blocks.
"""

import re
import tomllib
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Annotated, Any, ClassVar, Literal

import tomlkit
from pydantic import Field, PlainValidator, ValidationError
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, Item, Key
from tomlkit.items import Table as TomlTable

from mrelay.messages import MAX_BUSY_POLL
from mrelay.model.endpoint import interface_name, whole
from mrelay.model.issue import ConfigError, Issue, Table, fault, issues_of, show
from mrelay.model.rule import NAME, Rule, check_loops, check_names

__all__ = [
    "Config",
    "ConfigError",
    "Issue",
    "RelaySettings",
    "load_config",
    "parse_rules",
    "save_rules",
    "split_listen",
]

Trivia = list[tuple[Key | None, Item]]  # comments and blank lines, as tomlkit holds them

MIN_TCP_PORT = 1024  # supervisor/tcp.py refuses those below

_cores = whole(0, 1023, "a core's number such as 2; `nproc` says how many there are")
_busy_poll = whole(0, MAX_BUSY_POLL, "microseconds such as 60, or 0 for never")
_count = whole(1, 1024, 'a number such as 2, or "auto", or cores such as [0, 2]')


def _engine(value: object) -> Literal["auto", "ebpf", "uring"]:
    if value == "auto":
        return "auto"
    if value == "ebpf":
        return "ebpf"
    if value == "uring":
        return "uring"
    raise fault(f"{show(value)} is not an engine", 'use "auto", "ebpf" or "uring"')


def _workers(value: object) -> Literal["auto"] | int | list[int]:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and "," in value:  # as --workers takes it
        value = [core.strip() for core in value.removesuffix(",").split(",")]
    if not isinstance(value, list | tuple):
        return _count(value)
    cores = [_cores(core) for core in value]
    if not cores or len(set(cores)) < len(cores):
        raise fault("workers lists no core, or one core twice", 'list each core once, [0, 2], or use "auto"')
    return cores


def _gro(value: object) -> Literal["auto"] | bool:
    if value == "auto":
        return "auto"
    if isinstance(value, bool):
        return value
    raise fault(f"{show(value)} is none of the choices", 'use "auto", true or false, the last two unquoted')


def _xdp(value: object) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    remedy = 'use true, false, both unquoted, or the interfaces that have rules: ["eth0"]'
    if not isinstance(value, list | tuple):
        raise fault(f"{show(value)} is none of the choices", remedy)
    if not value:
        raise fault("xdp lists no interface", remedy)
    return tuple(map(interface_name, value))


def _socket_mode(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise fault(f"{show(value)} is not a file mode", 'write it in octal and quoted: socket_mode = "0660"')
    return value


def _socket_group(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", value):  # useradd(8)
        return value
    raise fault(f"{show(value)} is not a group's name", "name a group of this host; `getent group` lists them")


def _ring_slots(value: object) -> int:
    slots = whole(256, 65536, "a power of two such as 8192")(value)
    if slots & (slots - 1):
        nearest = 1 << slots.bit_length() - 1
        raise fault(f"{slots} is not a power of two", f"write {nearest} or {nearest * 2}")
    return slots


def _listen(value: object) -> str | None:
    """Address and port, in one spelling."""
    if value is None:
        return None
    remedy = 'write an address and a port: listen = "127.0.0.1:8080" or "[::1]:8080"'
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[0-9.]+):([0-9]{1,5})", value) if isinstance(value, str) else None
    try:
        address = ip_address(found[1].strip("[]")) if found else None
    except ValueError:
        address = None
    if found is None or address is None or address.is_multicast or (address.version == 6) != ("[" in found[1]):
        raise fault(f"{show(value)} is no address with a port", remedy)
    port = int(found[2])
    if not MIN_TCP_PORT <= port <= 65535:
        raise fault(f"port {port} is not from {MIN_TCP_PORT} to 65535", "take another; a proxy may have port 443")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def split_listen(text: str) -> tuple[str, int]:
    """Address and port of the setting `listen`."""
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


def _listen_names(value: object) -> tuple[str, ...]:
    remedy = 'list the names in the address bar: listen_names = ["relay.example.org"]'
    if not isinstance(value, list | tuple):
        raise fault(f"{show(value)} is no list of names", remedy)
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,253}", name):
            raise fault(f"{show(name)} is no host's name", remedy)
    return tuple(name.lower() for name in value)


class RelaySettings(Table):
    """The [relay] table: how the relay runs, not what it forwards.

    flow_limit counts flows held at once; ring_slots counts frames a worker's receive ring holds; busy_poll is for
    how many microseconds a worker looks for the next frame before it sleeps.
    """

    WHAT: ClassVar[str] = "[relay]"
    EXAMPLE: ClassVar[str] = 'a line [relay], and below it workers = "auto"'

    engine: Annotated[Literal["auto", "ebpf", "uring"], PlainValidator(_engine)] = "auto"
    workers: Annotated[Literal["auto"] | int | list[int], PlainValidator(_workers)] = "auto"
    gro: Annotated[Literal["auto"] | bool, PlainValidator(_gro)] = "auto"
    xdp: Annotated[bool | tuple[str, ...], PlainValidator(_xdp)] = False
    socket_mode: Annotated[str, PlainValidator(_socket_mode)] = "0660"
    socket_group: Annotated[str | None, PlainValidator(_socket_group)] = None
    listen: Annotated[str | None, PlainValidator(_listen)] = None
    listen_names: Annotated[tuple[str, ...], PlainValidator(_listen_names)] = ()
    flow_limit: Annotated[int, PlainValidator(whole(1, 1 << 20, "a number of flows such as 65536"))] = 65536
    ring_slots: Annotated[int, PlainValidator(_ring_slots)] = 8192
    busy_poll: Annotated[
        int, PlainValidator(whole(0, MAX_BUSY_POLL, "microseconds such as 60, or 0 for never"))
    ] = 60


class Config(Table):
    """A whole config file."""

    WHAT: ClassVar[str] = "a config file"

    relay: RelaySettings = RelaySettings()
    rules: tuple[Rule, ...] = Field(default=(), validation_alias="rule", serialization_alias="rule")


def load_config(text: str, file: str) -> Config:
    """The config that text says; file is only for the messages. Raises ConfigError with every issue."""
    document = _toml(text, file)
    rules, issues = _rules(document.pop("rule", []), file)
    try:
        settings = Config.read(document)
    except ValidationError as error:
        raise ConfigError(issues_of(error, file) + issues) from None
    if issues:
        raise ConfigError(issues)
    return Config(relay=settings.relay, rules=rules)


def parse_rules(tables: object, file: str) -> tuple[Rule, ...]:
    """The rules that an array of tables says. Raises ConfigError with every issue in them."""
    rules, issues = _rules(tables, file)
    if issues:
        raise ConfigError(issues)
    return rules


def save_rules(text: str | None, rules: Sequence[Rule]) -> str:
    """The config file text with exactly these rules; all else in it, comments too, stays as it is.

    A rule that the text already says is left untouched, a changed one keeps its place, a new one goes
    to the end. Raises ConfigError if text is not TOML.
    """
    document = _document(text or "")
    missing = {rule.name: rule for rule in rules}
    written = document.get("rule")
    if isinstance(written, AoT):
        _edit(document, written, missing)
    elif "rule" in document:  # an inline array, which can't be added to: write it anew
        document.remove("rule")
    parts = [document.as_string(), *map(_block, missing.values())]
    return "\n".join(part for part in parts if part.strip())


def _toml(text: str, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number too long for int()
        remedy = 'correct it there; texts stand in quotes, as in name = "studio-a"'
        raise ConfigError([Issue(file, "", "", f"this is not TOML: {error}", remedy)]) from None


def _rules(tables: object, file: str) -> tuple[tuple[Rule, ...], list[Issue]]:
    """The rules that are right by themselves, and what is wrong with the others or with all together."""
    if not isinstance(tables, list):
        remedy = "write [[rule]], with two brackets, above each rule"
        return (), [Issue(file, "", "rule", f"{show(tables)} is not an array of rules", remedy)]
    rules, names, issues = [], [], []
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, dict) else None
        names.append(name if isinstance(name, str) and NAME.fullmatch(name) else f"rule {number}")
        try:
            rules.append(Rule.read(table))
        except ValidationError as error:
            issues += issues_of(error, file, names[-1])
    return tuple(rules), issues + check_names(names, file) + check_loops(rules, file)


def _document(text: str) -> tomlkit.TOMLDocument:
    _toml(text, "")
    try:
        return tomlkit.parse(text if text.endswith("\n") or not text else text + "\n")
    except TOMLKitError as error:
        issue = Issue("", "", "", f"tomlkit can't edit this: {error}", "save to a new file instead")
        raise ConfigError([issue]) from None


def _edit(document: tomlkit.TOMLDocument, written: AoT, missing: dict[str, Rule]) -> None:
    """Update or remove each written rule, and take those that stay out of missing."""
    lead: Trivia = []  # what goes above the first rule
    place = lead
    kept: list[TomlTable] = []
    for table in written.body:
        name = table.get("name")
        rule = missing.pop(name, None) if isinstance(name, str) else None
        # tomlkit counts the comment above a rule as the end of the rule before it.
        tail = _cut_tail(table)
        if rule:
            _update(table, rule)
            kept.append(table)
            place = _end(table)
        if rule or any(item.as_string().strip() for _, item in tail):
            place += tail
    at = next(i for i, (_, item) in enumerate(document.body) if item is written)
    document.body[at : at if kept else at + 1] = lead  # no rule left: tomlkit would write `rule = []`
    written.body[:] = kept


def _update(table: TomlTable, rule: Rule) -> None:
    if _says(table, rule):
        return
    want = rule.to_table()
    # Endpoints under headers of their own ([rule.from]) have to stand last, so text can't replace one.
    nested = any(isinstance(value, TomlTable | AoT) for value in table.values())
    for key in [key for key in table if nested or key not in want]:
        table.remove(key)
    for key, value in want.items():
        if table.get(key) != value:
            table[key] = _array(value) if isinstance(value, list) else value


def _says(table: TomlTable, rule: Rule) -> bool:
    try:
        return Rule.read(table.unwrap()) == rule
    except ValidationError:
        return False


def _end(table: TomlTable) -> Trivia:
    """The list of items that the last line of table stands in."""
    last = table.value.body[-1][1] if table.value.body else None
    if isinstance(last, AoT) and last.body:
        last = last.body[-1]
    return _end(last) if isinstance(last, TomlTable) else table.value.body


def _cut_tail(table: TomlTable) -> Trivia:
    """Take the comments and blank lines off a table's end."""
    body = _end(table)
    start = len(body)
    while start and body[start - 1][0] is None:
        start -= 1
    tail = body[start:]
    del body[start:]
    return tail


def _block(rule: Rule) -> str:
    table = tomlkit.table()
    for key, value in rule.to_table().items():
        table[key] = _array(value) if isinstance(value, list) else value
    return f"[[rule]]\n{table.as_string()}"


def _array(values: list[str]) -> Array:
    array = tomlkit.array()
    array.extend(values)
    return array.multiline(len(values) > 2)
