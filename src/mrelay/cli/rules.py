"""`mrelay rule add|remove|list`, `mrelay apply`, `mrelay save`: the running rules.

Called by the command line. Blocks on the control socket and on config files. add, remove and list leave
every check to the relay, so they need not import the model and stay quick.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

from cyclopts import Parameter
from rich.console import RenderableType

from mrelay.cli import files, output
from mrelay.cli.client import TIMEOUT, Client
from mrelay.cli.failure import BAD_CONFIG, Failure
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Every, Socket, Watch, running_rules

if TYPE_CHECKING:
    from mrelay.model.config import Config

_NAME: Final = Parameter(help="The rule's name: 1 to 64 of A-Z a-z 0-9 . _ -")
_SECONDS_A_RULE: Final = 0.005  # to wait for an answer: on a busy machine, ten times what one takes
_MARKS: Final = {"added": "+", "removed": "-", "changed": "~"}


def add(
    name: Annotated[str, _NAME],
    /,
    *,
    from_: Annotated[str, Parameter(name="--from", metavar="ENDPOINT", help="What to receive.")],
    to: Annotated[
        tuple[str, ...],
        Parameter(metavar="ENDPOINT", help="Where to send it; repeat for several outputs."),
    ],
    link_local: Annotated[bool, Parameter(help="Allow groups of 224.0.0.0/24 and ff02::/16.")] = False,
    allow_loop: Annotated[bool, Parameter(help="Allow an output that comes back to an input.")] = False,
    rate: Annotated[
        str | None, Parameter(help="Pass at most this on each worker: 10kpps, 50Mbit/s, or both with a comma.")
    ] = None,
    health: Annotated[
        str | None,
        Parameter(
            help="Measure its streams: auto, rtp, mpegts, moldudp64, any, or sequence,offset=N,size=N; alarms "
            "after commas: loss=0.1%, jitter=30ms, silence=5s (or off); sample=10 listens one second in ten."
        ),
    ] = None,
    as_json: AsJson = False,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """POST the rule and say what state it is in."""
    allowed = {key: True for key, on in {"link_local": link_local, "allow_loop": allow_loop}.items() if on}
    asked = {key: text for key, text in {"rate": rate, "health": health}.items() if text is not None}
    table = {"name": name, "from": from_, "to": list(to), **allowed, **asked}
    rule = Client(socket).request("POST", "/v1/rules", table)
    if as_json:
        output.print_json(rule)
    else:
        print(f"added {rule['name']}: {rule['state']}")


def remove(
    name: Annotated[str, _NAME, Parameter(completer=running_rules)], /, *, socket: Socket = DEFAULT_SOCKET
) -> None:
    """DELETE the rule."""
    Client(socket).request("DELETE", f"/v1/rules/{quote(name, safe='')}")
    print(f"removed {name}")


def list_rules(
    *, as_json: AsJson = False, watch: Watch = False, every: Every = 1.0, socket: Socket = DEFAULT_SOCKET
) -> None:
    """The running rules, in the relay's order."""
    client = Client(socket)
    output.show(lambda: client.get("/v1/rules"), _rules_table, as_json=as_json, watch=watch, every=every)


def apply(
    file: Annotated[Path, Parameter(help="Config file; - is standard input.")],
    /,
    *,
    dry_run: Annotated[bool, Parameter(help="Show the difference, change nothing.")] = False,
    as_json: AsJson = False,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """PUT the file's rules and show what that changed."""
    config = _parse(files.read(file), file)
    client = Client(socket)
    before = {rule["name"]: rule for rule in client.get("/v1/rules")["rules"]}
    after: dict[str, dict[str, Any]] = {rule.name: rule.to_table() for rule in config.rules}
    target = f"/v1/rules?dry_run={'true' if dry_run else 'false'}"
    patience = TIMEOUT + _SECONDS_A_RULE * (len(before) + len(after))
    difference = client.request("PUT", target, {"rules": list(after.values())}, patience=patience)
    if as_json:
        output.print_json(difference)
    else:
        _print_difference(difference, before, after, dry_run)
    _mention_settings(config)


def save(
    file: Annotated[Path | None, Parameter(help="File to write; none: print.")] = None,
    /,
    *,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """GET the rules and write them into the file's text."""
    answer = Client(socket).get("/v1/rules")["rules"]
    from mrelay.model.config import parse_rules, save_rules

    rules = parse_rules([_table_of(rule) for rule in answer], "the relay")
    if file is None:
        sys.stdout.write(save_rules(None, rules))
        return
    text = files.read(file) if file.exists() else None
    if text is not None:
        _parse(text, file)  # a file with errors is the operator's to mend; writing into it would hide them
    files.write(file, save_rules(text, rules))
    print(f"saved {output.plural(len(rules), 'rule')} to {file}")


def _parse(text: str, file: Path) -> "Config":
    from mrelay.model.config import ConfigError, load_config

    try:
        return load_config(text, str(file))
    except ConfigError as error:
        raise Failure(*map(str, error.issues), status=BAD_CONFIG) from error


def _table_of(rule: dict[str, Any]) -> dict[str, Any]:
    """The rule as an operator would write it, from what the API lists."""
    table = {key: rule[key] for key in ("name", "from", "to")}
    return table | {key: rule[key] for key in ("link_local", "allow_loop", "rate", "health") if rule.get(key)}


def _rules_table(answer: dict[str, Any]) -> RenderableType:
    rows = [row for rule in answer["rules"] for row in _rule_rows(rule)]
    if not rows:
        return "No rules: add one with 'mrelay rule add' or 'mrelay apply FILE'."
    return output.table(("RULE", "FROM", "TO", "STATE"), rows)


def _from(rule: dict[str, Any]) -> str:
    return f"{rule['from']} at most {rule['rate']}" if rule.get("rate") else str(rule["from"])


def _rule_rows(rule: dict[str, Any]) -> list[list[str]]:
    """The rule's own state, then each output's; one row does for a single output."""
    outputs = rule["outputs"]
    if len(outputs) == 1:
        return [[rule["name"], _from(rule), outputs[0]["to"], rule["state"]]]
    return [
        [rule["name"], _from(rule), "", rule["state"]],
        *(["", "", output["to"], output["state"]] for output in outputs),
    ]


def _print_difference(
    difference: dict[str, list[str]],
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    dry_run: bool,
) -> None:
    for kind, mark in _MARKS.items():
        for name in difference[kind]:
            print(f"{mark} {name}  {_line(name, before if kind == 'removed' else after)}")
            if kind == "changed":
                print(f"    was  {_line(name, before)}")
    counts = ", ".join(f"{len(difference[kind])} {kind}" for kind in (*_MARKS, "unchanged"))
    print(f"dry run, nothing changed: {counts}" if dry_run else counts)


def _line(name: str, rules: dict[str, dict[str, Any]]) -> str:
    """`FROM -> TO  TO`; empty when the rule came or went between two requests."""
    if name not in rules:
        return ""
    rule = rules[name]
    allowed = "".join(f" {key}" for key in ("link_local", "allow_loop") if rule.get(key))
    rate = f" rate {rule['rate']}" if rule.get("rate") else ""
    health = f" health {rule['health']}" if rule.get("health") else ""
    return f"{rule['from']} -> {'  '.join(rule['to'])}{allowed}{rate}{health}"


def _mention_settings(config: "Config") -> None:
    if config.relay.model_fields_set:
        print("note: settings under [relay] take effect when the relay next starts", file=sys.stderr)
