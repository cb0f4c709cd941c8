"""Command lines, parsed and not run: a command with its arguments, or an error that says what is wrong."""

from cyclopts import CycloptsError

from mrelay import cli


def check(data: bytes) -> None:
    arguments = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")][:40]
    try:
        command, bound, _ = cli.app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        assert cli._usage_error(error).strip()
        return
    assert callable(command)
    assert bound is not None
