"""Writes docs/man/mrelay.1 from the command line's own help, so that the two cannot differ.

Run it after any change to a command or an option: `python scripts/make_man.py`. A test compares its
output with the file. `page()` does no I/O beyond importing the commands.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App, Argument

from mrelay import __version__
from mrelay.cli import COMMANDS, HELP, RULE_COMMANDS, TOP_EXAMPLES, Command, app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "man" / "mrelay.1"

FILES = {
    "/run/mrelay/control.sock": "The control socket. Its mode and group decide who may talk to the relay.",
    "/var/lib/mrelay": "State that a relay keeps over a restart.",
}
OPTIONS = {
    "--help": "Explain a command; each has its own.",
    "--version": "Print the version.",
    "--install-completion": "Install completion for your shell.",
}
ENVIRONMENT = {"MRELAY_SOCKET": "The control socket, where --socket is not given."}


def page() -> str:
    """The whole manual page, in the man(7) macros."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield '.\\" Made by scripts/make_man.py; change the commands, not this file.'
    yield f'.TH MRELAY 1 "" "mrelay {__version__}" "User Commands"'
    summary, _, description = HELP.partition("\n\n")
    yield from (".SH NAME", f"mrelay \\- {_text(summary[0].lower() + summary[1:].rstrip('.'))}")
    yield from (".SH SYNOPSIS", ".B mrelay", ".I COMMAND", "[\\fIOPTIONS\\fR]")
    yield from (".SH DESCRIPTION", *_paragraphs(description))
    yield from (".SH OPTIONS", *_definitions(OPTIONS))
    yield ".SH COMMANDS"
    for command in COMMANDS:
        yield from _command(command, app[command.name], [command.name])
    for command in RULE_COMMANDS:
        yield from _command(command, app["rule"][command.name], ["rule", command.name])
    yield from (".SH ENVIRONMENT", *_definitions(ENVIRONMENT))
    yield from (".SH FILES", *_definitions(FILES))
    yield from (".SH EXAMPLES", *_examples(TOP_EXAMPLES))


def _command(command: Command, its: App, chain: list[str]) -> Iterator[str]:
    with app.app_stack(chain):  # or the defaults that the commands inherit would be missing
        arguments = list(its.assemble_argument_collection(parse_docstring=True))
    named = " ".join(_operand(argument) for argument in arguments if _is_operand(argument))
    yield f".SS mrelay {' '.join(chain)} {named}".rstrip()
    yield from _paragraphs(command.help)
    for argument in arguments:
        yield from (".TP", _heading(argument), _text(_explanation(argument)))
    yield from (".PP", "Examples:", *_examples(command.examples))


def _is_operand(argument: Argument) -> bool:
    return argument.field_info.is_positional


def _operand(argument: Argument) -> str:
    name = f"\\fI{argument.name.lstrip('-').upper()}\\fR"
    return name if argument.required else f"[{name}]"


def _heading(argument: Argument) -> str:
    if _is_operand(argument):
        return _operand(argument)
    names = ", ".join(f"\\fB{_text(name)}\\fR" for name in argument.names)
    return names if argument.is_flag() else f"{names} \\fI{_text(_value(argument))}\\fR"


def _value(argument: Argument) -> str:
    choices = argument.get_choices()
    return "|".join(choices) if choices else argument.parameter.metavar or "VALUE"


def _explanation(argument: Argument) -> str:
    said = argument.parameter.help or ""
    said = said[0].upper() + said[1:] if said else said
    default = argument.field_info.default
    if argument.required or default in (None, False, argument.field_info.empty):
        return said
    return f"{said.rstrip('.')} (default {default})."


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        yield from (".PP", _text(paragraph))


def _definitions(entries: dict[str, str]) -> Iterator[str]:
    for name, meaning in entries.items():
        yield from (".TP", f".B {_text(name)}", _text(meaning))


def _examples(lines: tuple[str, ...]) -> Iterator[str]:
    yield from (".PP", ".RS 4", ".nf", *map(_text, lines), ".fi", ".RE")


def _text(text: str) -> str:
    """Plain text for roff: hyphens that stay hyphens, no accidental requests at the start of a line."""
    text = re.sub(r"\s+", " ", text).strip().replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
