"""The command line: what commands there are, and how they fail.

Owns the table of commands (where each lives, one-line help, examples) and `main`, which the `mrelay`
script and `python -m mrelay` call. Nothing here blocks. A command's module is imported only when that
command runs, so `mrelay --help` and the client commands stay quick; keep it so.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter, UnknownCommandError

from mrelay import __version__
from mrelay.cli.failure import FAILED, INTERRUPTED, USAGE, Failure


class Command(NamedTuple):
    """One command: `help` starts with the line that lists show; `examples` are whole command lines."""

    name: str
    where: str
    group: Group
    help: str
    examples: tuple[str, ...]


RUN: Final = Group.create_ordered("Run the relay")
READ: Final = Group.create_ordered("Look at a running relay")
CHANGE: Final = Group.create_ordered("Change a running relay")
TEST: Final = Group.create_ordered("Test the network")
SHELL: Final = Group.create_ordered("Shell")

COMMANDS: Final = (
    Command(
        "run",
        "mrelay.cli.run:run",
        RUN,
        "Run the relay in the foreground; prints 'ready' once it forwards.\n\n"
        "Logs go to stderr. A rule whose interface is missing waits for it and does not hold up 'ready'. "
        "Needs root or the relay's capabilities: exit 77 when they are missing, 78 when the file is wrong.",
        (
            "mrelay run --config /etc/mrelay/relay.toml",
            "mrelay run --config lab.toml --workers 0,2 --socket /tmp/lab.sock --state-dir /tmp/lab",
        ),
    ),
    Command(
        "check",
        "mrelay.cli.check:check",
        RUN,
        "Validate a config file and say what it would join and send.\n\n"
        "Lists every error at once. Warnings tell what would keep it from working on this host; they do not "
        "fail the check. Exit 0 when the file is valid, 1 when not.",
        ("mrelay check /etc/mrelay/relay.toml", "mrelay check --json relay.toml"),
    ),
    Command(
        "doctor",
        "mrelay.cli.doctor:doctor",
        RUN,
        "Check this host: kernel, io_uring, clock, the fast path and XDP, capabilities, sysctls, offloads, "
        "interrupts, limits of containers and units.\n\n"
        "Each finding says what follows from it and the command that changes it. Changes nothing, unless told "
        "to: --fix runs the commands that it shows, as root, one by one, says what each did, and looks again. "
        "Exit 1 if anything is bad, or a command failed.",
        ("mrelay doctor", "sudo mrelay doctor --json", "sudo mrelay doctor --fix"),
    ),
    Command(
        "why",
        "mrelay.cli.why:why",
        READ,
        "Say whether a rule forwards; if not, where its stream stops, and what to do.\n\n"
        "Goes through the stages in order (rule, interface, membership, querier, frames, headers, workers, loop, "
        "limits, outputs, flow, receivers, forwarding), looks at the traffic for a moment, and stops at the "
        "first that fails. Without NAME, a line for each rule. If nothing comes for its groups, and nothing has "
        "for ten seconds, they are joined anew once. Exit 0 when all forwards, 1 when not.",
        ("mrelay why studio-a", "mrelay why studio-a --seconds 30", "mrelay why", "mrelay why studio-a --json"),
    ),
    Command(
        "flows",
        "mrelay.cli.tables:flows",
        READ,
        "Show the streams seen on the wire and where each one goes.",
        ("mrelay flows", "mrelay flows --watch --every 2", "mrelay flows --json"),
    ),
    Command(
        "stats",
        "mrelay.cli.tables:stats",
        READ,
        "Show what came in, what went out by rule, and what was dropped and why.\n\n"
        "All counts are of datagrams. Every datagram received is either matched by a rule or counted under "
        "exactly one drop reason: received = matched + all drops.",
        ("mrelay stats", "mrelay stats --watch", "mrelay stats --json"),
    ),
    Command(
        "workers",
        "mrelay.cli.tables:workers",
        READ,
        "Show the workers: core, state, restarts, load.",
        ("mrelay workers", "mrelay workers --watch --every 5"),
    ),
    Command(
        "top",
        "mrelay.cli.top:top",
        READ,
        "Watch rules and flows in the terminal: rates, engines, errors, the last minute.\n\n"
        "Enter opens a rule with its outputs and flows, Escape goes back; Tab turns between rules and flows, s "
        "changes the order, / looks for words, q quits. A relay that restarts is waited for.",
        ("mrelay top", "mrelay top --show flows --sort bits --filter 239.1.1", "mrelay top --once --sort state"),
    ),
    Command(
        "events",
        "mrelay.cli.events:events",
        READ,
        "Show what happened lately: rules, outputs, interfaces, workers, flows, drops, alarms.\n\n"
        "With --follow, the last ten and then each as it happens; a relay that restarts is waited for, and what "
        "was missed is said on stderr. 4,096 events are kept; ids start at 1 again with each control process.",
        ("mrelay events", "mrelay events --follow", "mrelay events --json --since 42"),
    ),
    Command(
        "health",
        "mrelay.cli.health:health",
        READ,
        "Show loss, reordering, duplicates and jitter of the streams of rules that ask for it.\n\n"
        'A rule asks by its key health, for example health = "rtp,loss=0.1%,silence=5s". Formats: rtp (and '
        "MPEG-TS in it), mpegts, moldudp64, sequence (any field), any (silence alone), auto. What the relay "
        "itself could not hear is not held against a stream: then SEEN says 'not all'.",
        ("mrelay health", "mrelay health studio-a --watch", "mrelay health --json"),
    ),
    Command(
        "discover",
        "mrelay.cli.discover:discover",
        READ,
        "List the streams on an interface, and the rule that would relay each.\n\n"
        "Groups that are sent to or asked for (IGMP, MLD), with sources, rates, and names by SAP/SDP and "
        "multicast DNS. Listens through the running relay; the interface needs no rule. Joins nothing unless told "
        "to, so behind a switch with snooping only what is asked for on this port can be heard.",
        (
            "mrelay discover eth0",
            "mrelay discover eth0 --seconds 60 --to eth1",
            "mrelay discover eth0 --join 224.2.127.254 --json",
        ),
    ),
    Command(
        "capture",
        "mrelay.cli.capture:capture",
        READ,
        "Write the packets of a rule or flow to a pcapng file, for tshark and the like.\n\n"
        "--side in: as they arrive, whatever carries them; out: as they leave; dropped: those that the relay "
        "would drop, with the reason as the packet's comment. What XDP carries can't be captured. Ends after "
        "--seconds, --packets or --bytes, or with Ctrl-C; merged frames are taken apart, VLAN tags are put back.",
        (
            "mrelay capture studio-a -w studio-a.pcapng",
            "mrelay capture studio-a --side dropped --seconds 30 -w - | tshark -r -",
            "mrelay capture eth0:10.1.1.9@239.1.1.1:5000 --packets 100",
        ),
    ),
    Command(
        "stop",
        "mrelay.cli.stop:stop",
        CHANGE,
        "Stop the relay.\n\n"
        "Streams that the kernel's fast path carries go on, and the next relay takes them over without a gap, "
        "for an upgrade, say. Their memberships last as long as a service manager keeps them. With --flush all "
        "ends; when no relay runs, what an earlier one left in the kernel is removed (as root). SIGTERM ends "
        "all, too; SIGUSR1 is like this command without --flush.",
        ("mrelay stop", "sudo mrelay stop --flush"),
    ),
    Command(
        "apply",
        "mrelay.cli.rules:apply",
        CHANGE,
        "Make the running rules equal a file's, and show the difference.\n\n"
        "Rules that stay the same are not disturbed. Lines start with + (added), - (removed) or ~ (changed). "
        "Only rules are applied; settings under [relay] are read when the relay starts.",
        ("mrelay apply --dry-run relay.toml", "mrelay apply relay.toml"),
    ),
    Command(
        "save",
        "mrelay.cli.rules:save",
        CHANGE,
        "Write the running rules to a file, its comments and order kept.\n\n"
        "Without FILE the rules are printed. The file is replaced whole or not at all.",
        ("mrelay save", "mrelay save /etc/mrelay/relay.toml"),
    ),
    Command(
        "log",
        "mrelay.cli.log:log",
        CHANGE,
        "Show or change what the running relay logs.\n\n"
        "Without LEVEL the levels are printed. A change holds until the relay stops.",
        ("mrelay log", "mrelay log debug --role control", "mrelay log info"),
    ),
    Command(
        "send",
        "mrelay.cli.traffic:send",
        TEST,
        "Send a test stream whose datagrams carry sequence numbers and timestamps.",
        ("mrelay send eth0:239.1.1.1:5000", "mrelay send --help"),
    ),
    Command(
        "receive",
        "mrelay.cli.traffic:receive",
        TEST,
        "Receive a test stream; report loss, reordering, duplicates and latency.",
        ("mrelay receive eth1:239.2.2.2:6000", "mrelay receive --help"),
    ),
    Command(
        "demo",
        "mrelay.demo.command:demo",
        TEST,
        "Show a source, a relay and receivers at work in namespaces of their own.",
        ("sudo mrelay demo", "sudo mrelay demo --help"),
    ),
    Command(
        "completion",
        "mrelay.cli.shell:completion",
        SHELL,
        "Print the completion script for a shell.",
        (
            "mrelay completion bash > /etc/bash_completion.d/mrelay",
            "mrelay --install-completion",
        ),
    ),
)

RULE_COMMANDS: Final = (
    Command(
        "add",
        "mrelay.cli.rules:add",
        CHANGE,
        "Add a rule to the running relay.\n\n"
        "An endpoint is IFACE:[SOURCE@]ADDRESS:PORT, IPv6 addresses in brackets, options after commas. "
        "Input: vlan=N. Output: ttl=N, source=egress|keep|ADDRESS, dscp=N; * keeps the input's address or "
        "port. The relay keeps its rules over a restart; 'mrelay save FILE' writes them to a config file.",
        (
            "mrelay rule add studio-a --from eth0:239.1.1.1:5000 --to eth1:239.2.2.2:6000",
            "mrelay rule add b --from eth0:10.1.1.9@232.1.1.1:5000 --to 'eth1:*:*' --to wg0:10.9.0.2:6000",
        ),
    ),
    Command(
        "remove",
        "mrelay.cli.rules:remove",
        CHANGE,
        "Remove a rule from the running relay. The others keep forwarding.",
        ("mrelay rule remove studio-a",),
    ),
    Command(
        "list",
        "mrelay.cli.rules:list_rules",
        READ,
        "List the running rules and the state of each.",
        ("mrelay rule list", "mrelay rule list --watch", "mrelay rule list --json"),
    ),
)

TOP_EXAMPLES: Final = (
    "mrelay check relay.toml",
    "sudo mrelay run --config relay.toml",
    "mrelay rule add a --from eth0:239.1.1.1:5000 --to eth1:239.2.2.2:6000",
    "mrelay flows --watch",
)

HELP: Final = (
    "Relay multicast UDP streams to other interfaces, groups, ports and hosts.\n\n"
    "Commands that talk to a running relay find it by --socket or MRELAY_SOCKET "
    "(default /run/mrelay/control.sock). Exit codes: 0 done, 1 failed, 2 wrong usage, 77 not permitted, "
    "78 wrong config file, 130 interrupted."
)


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def _usage_error(error: CycloptsError) -> str:
    chain = error.command_chain or ()
    said = _unknown_command(error) if isinstance(error, UnknownCommandError) else str(error).strip()
    return f"{said.rstrip('.')}{'' if said.endswith('?') else '.'} See '{' '.join(['mrelay', *chain])} --help'."


def _unknown_command(error: UnknownCommandError) -> str:
    """cyclopts's own words for it would import every command."""
    known = RULE_COMMANDS if error.command_chain else COMMANDS
    word = (error.unused_tokens or [""])[0]
    near = difflib.get_close_matches(word, [command.name for command in known] + ["rule"], 1)
    return f"there is no command '{word}'" + (f"; did you mean '{near[0]}'?" if near else "")


def _register(parent: App, commands: Sequence[Command]) -> None:
    for command in commands:
        parent.command(
            command.where,
            name=command.name,
            group=command.group,
            help=command.help,
            help_epilogue=_examples(command.examples),
        )


def _build() -> App:
    top = App(
        name="mrelay",
        help=HELP,
        version=f"mrelay {__version__}",
        help_format="plaintext",
        help_epilogue=_examples(TOP_EXAMPLES),
        default_parameter=Parameter(negative=(), show_default=lambda value: value if value is not False else None),
        print_error=False,  # `main` prints and exits, for these and all other failures
        exit_on_error=False,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    rule = App(
        name="rule",
        help="Add, remove and list the running rules.",
        group=CHANGE,
        help_epilogue=_examples([command.examples[0] for command in RULE_COMMANDS]),
    )
    _register(rule, RULE_COMMANDS)
    _register(top, COMMANDS)
    top.command(rule)
    top.register_install_completion_command(
        group=SHELL,
        help="Install completion for your shell.",
        help_epilogue=_examples(["mrelay --install-completion --shell bash"]),
    )
    return top


app: Final = _build()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command line (default: the process's) and exit with its status."""
    try:
        result = app(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # here, where a closed pipe can still be answered
    except CycloptsError as error:
        _quit([_usage_error(error)], USAGE)
    except Failure as failure:
        _quit(failure.lines, failure.status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone. Without this the interpreter's own flush at exit complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(FAILED)
    sys.exit(result if isinstance(result, int) else 0)


def _quit(lines: Sequence[str], status: int) -> NoReturn:
    for line in lines:
        print(f"mrelay: {line}", file=sys.stderr)
    sys.exit(status)
