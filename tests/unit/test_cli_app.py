"""The command line itself: help, usage errors, laziness, `run`, completion, live views, Ctrl-C, pipes."""

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_relay import FakeRelay, Run
from mrelay import __version__
from mrelay.cli import COMMANDS, RULE_COMMANDS

EVERY = [[command.name] for command in COMMANDS] + [["rule", command.name] for command in RULE_COMMANDS]
FLOWS: dict[str, list[object]] = {"flows": []}


@pytest.mark.parametrize("command", [[], ["rule"], *EVERY], ids=" ".join)
def test_every_help_has_examples(run: Run, command: list[str]) -> None:
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    assert "Examples:\n  " in out


@pytest.mark.parametrize("command", EVERY, ids=" ".join)
def test_every_parameter_is_explained(command: list[str]) -> None:
    from mrelay.cli import app

    arguments = app[command[0]] if len(command) == 1 else app["rule"][command[1]]
    for argument in arguments.assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help, argument.name


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"mrelay {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["flow"], "there is no command 'flow'; did you mean 'flows'? See 'mrelay --help'."),
        (["rule", "ad"], "there is no command 'ad'; did you mean 'add'? See 'mrelay rule --help'."),
        (["flows", "--bogus"], "Unknown option: --bogus. See 'mrelay flows --help'."),
        (["rule", "add", "a", "--from", "x"], "parameter --to requires an argument"),
        (["flows", "--every", "0"], "--every"),
        (["run", "--workers", "many"], "'many' is not auto, a number of workers, or a list of cores"),
        (["run", "--workers", "0"], "a relay needs at least 1 worker"),
        (["run", "--engine", "dpdk"], "ebpf"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(run: Run, arguments: list[str], says: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mrelay: ")
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], "mrelay.cli.client mrelay.cli.rules pydantic numpy pyroute2 fastapi"),
        (["flows"], "mrelay.model pydantic numpy pyroute2 fastapi"),
        (["rule", "remove", "a"], "mrelay.model pydantic numpy pyroute2 fastapi"),
    ],
    ids=" ".join,
)
def test_commands_import_only_what_they_need(tmp_path: Path, arguments: list[str], unwanted: str) -> None:
    code = (
        "import sys; from mrelay.cli import main\n"
        f"try: main({arguments!r})\n"
        f"except SystemExit: print(*[m for m in {unwanted.split()!r} if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"MRELAY_SOCKET": str(tmp_path / "none.sock")},
    )
    assert result.stderr.splitlines()[-1] == ""


# ---- run ---------------------------------------------------------------------------------------


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Catch the exec; the function gives the command that was executed."""
    commands: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        commands.append([path, *command])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    return lambda: commands[-1]


def test_run_becomes_the_supervisor(
    run: Run, executed: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relay.toml").touch()
    flags = "--config relay.toml --engine uring --workers 2,0 --socket c.sock --state-dir state"
    flags += " --user nobody --worker-user daemon"
    assert run("run", *flags.split()).status == 0
    path, *command, settings = executed()
    assert (path, command) == (sys.executable, [sys.executable, "-P", "-m", "mrelay.supervisor"])
    assert json.loads(settings) == {
        "config": str(tmp_path / "relay.toml"),
        "engine": "uring",
        "workers": [0, 2],
        "socket": str(tmp_path / "c.sock"),
        "state_dir": str(tmp_path / "state"),
        "pin_dir": "/sys/fs/bpf/mrelay",
        "user": "nobody",
        "worker_user": "daemon",
        "log_format": "text",
        "log_level": "info",
    }


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("3", 3), ("0,", [0]), ("1,1,2", [1, 2])])
def test_workers(run: Run, executed: Callable[[], list[str]], text: str, value: object) -> None:
    run("run", "--workers", text)
    assert json.loads(executed()[-1])["workers"] == value


def test_run_by_default(run: Run, executed: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MRELAY_SOCKET", raising=False)
    run("run")
    assert json.loads(executed()[-1]) == {
        "config": None,
        "engine": None,
        "workers": None,
        "socket": "/run/mrelay/control.sock",
        "state_dir": "/var/lib/mrelay",
        "pin_dir": "/sys/fs/bpf/mrelay",
        "user": None,
        "worker_user": None,
        "log_format": "text",
        "log_level": "info",
    }


def test_run_without_the_file(run: Run, executed: Callable[[], list[str]], tmp_path: Path) -> None:
    status, _, err = run("run", "--config", str(tmp_path / "none.toml"))
    assert status == 78
    assert "no config file at" in err


# ---- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(run: Run, shell: str) -> None:
    status, out, _ = run("completion", shell)
    assert status == 0
    assert all(command.name in out for command in COMMANDS)


RULES = {"rules": [{"name": "studio-a"}, {"name": "studio-b"}, {"name": "feed"}]}
# The script itself, as bash calls it at the Tab key.
AT_THE_KEY = """
source "$1"; shift
PATH="$(dirname "$PYTHON"):$PATH"
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_mrelay
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("command", [["rule", "remove"], ["why"], ["health"], ["capture", "--side", "out"]])
def test_bash_completes_names_of_running_rules(
    run: Run, relay: FakeRelay, tmp_path: Path, command: list[str]
) -> None:
    relay.answer("GET /v1/rules", RULES)
    script = tmp_path / "mrelay.bash"
    script.write_text(run("completion", "bash").out)
    words = ["bash", "-c", AT_THE_KEY, "bash", str(script), "mrelay", *command, "st"]
    found = subprocess.run(
        words, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=True
    )
    assert (found.stdout.split(), found.stderr) == (["studio-a", "studio-b"], "")


def completed(run: Run, *words: str) -> list[str]:
    """What the shell is given, behind the mark at which that begins; nothing else may show."""
    status, out, err = run("__complete", *words)
    assert (status, err) == (0, "")
    return out.partition("\x1fbegin\n")[2].split()


def test_rules_are_completed_of_the_relay_that_is_named(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    relay.answer("GET /v1/rules", RULES)
    with FakeRelay(tmp_path / "other.sock") as other:
        other.answer("GET /v1/rules", {"rules": [{"name": "lab"}]})
        assert completed(run, "why", "--socket", str(other.path), "") == ["lab"]
    assert completed(run, "why", "") == ["studio-a", "studio-b", "feed"]


def test_completion_says_nothing_without_a_relay(
    run: Run, relay: FakeRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed(run, "why", "--socket", str(tmp_path / "none.sock"), "") == []
    relay.refuse("GET /v1/rules", 403, {"rule": "", "key": "", "problem": "no", "remedy": ""})
    assert completed(run, "why", "") == []
    monkeypatch.setattr("mrelay.cli.options._AT_THE_KEY", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        assert completed(run, "why", "--socket", str(tmp_path / "silent.sock"), "") == []


# ---- live views, Ctrl-C, pipes -------------------------------------------------------------------


def start(relay: FakeRelay, *arguments: str, out: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mrelay", *arguments],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MRELAY_SOCKET": str(relay.path), "TERM": "xterm"},
    )


def end(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str]:
    """Signal it: its exit status and what it said on stderr."""
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def test_watch_json_is_a_line_each_time_until_interrupted(relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", FLOWS)
    with start(relay, "flows", "--watch", "--every", "0.1", "--json") as process:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline()) for _ in range(3)] == [FLOWS] * 3
        assert end(process) == (130, "")


def test_watch_on_a_terminal_ends_cleanly_when_interrupted(relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", FLOWS)
    master, slave = pty.openpty()
    with start(relay, "flows", "--watch", "--every", "0.1", out=slave) as process:
        os.close(slave)
        seen = b""
        while seen.count(b"No flows") < 3:
            seen += os.read(master, 4096)
        assert end(process) == (130, "")
    os.set_blocking(master, False)
    seen += os.read(master, 65536)
    os.close(master)
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is back


def test_watch_ends_when_the_relay_does(relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", FLOWS)
    with start(relay, "flows", "--watch", "--every", "0.1") as process:
        assert process.stdout is not None
        process.stdout.readline()
        relay.path.unlink()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("mrelay: no relay at ")
    assert err.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback(relay: FakeRelay) -> None:
    relay.answer("GET /v1/flows", FLOWS)
    with start(relay, "flows", "--watch", "--every", "0.1", "--json") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "")
