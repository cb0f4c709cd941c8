"""Rules: one input, one or more outputs, and what is refused by default.

Owns Rule and the checks across rules (names, loops). Called by config.py, the control role and the
CLI. Nothing here blocks.
"""

import graphlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, ValidationInfo

from mrelay.model.endpoint import Address, Input, Network, Output, link_local, overlap, text_of
from mrelay.model.health import Health, read_health
from mrelay.model.issue import Issue, Table, fault, show
from mrelay.model.rate import Rate, read_rate

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def feeds(output: Output, origin: Input, target: Input) -> bool:
    """Whether what output sends for origin could match target. Output leaves untagged."""
    return (
        output.interface == target.interface
        and target.vlan is None
        and overlap(_sent_to(output, origin), target.address)
        and (output.port or origin.ports.low) <= target.ports.high
        and (output.port or origin.ports.high) >= target.ports.low
        and _source_fits(output, origin, target)
    )


def _sent_to(output: Output, origin: Input) -> Network | Address:
    return output.address or origin.address


def _source_fits(output: Output, origin: Input, target: Input) -> bool:
    """The egress interface's address isn't known here, so egress may be any."""
    sent_from: Network | Address | None = origin.source if output.source == "keep" else None
    if not isinstance(output.source, str):
        sent_from = output.source
    return sent_from is None or target.source is None or overlap(sent_from, target.source)


def _name(value: object) -> str:
    if isinstance(value, str) and NAME.fullmatch(value):
        return value
    raise fault(f"{show(value)} is not a rule's name", "use 1 to 64 of A-Z a-z 0-9 . _ -, for example studio-a")


# The checks below read other keys from info.data, where a key that has an error of its own is absent;
# then they say nothing rather than complain about the consequence.


def _input_allowed(value: Input, info: ValidationInfo) -> Input:
    if link_local(value.address) and not info.data.get("link_local", True):
        raise fault(
            f"{text_of(value.address)} has groups that never leave their link",
            "set link_local = true if that is meant, or write another group",
        )
    return value


def _output_allowed(value: Output, info: ValidationInfo) -> Output:
    origin: Input | None = info.data.get("from_")
    if value.address and link_local(value.address) and not info.data.get("link_local", True):
        raise fault(
            f"{value.address} is a group that never leaves its link",
            "set link_local = true if that is meant, or write another group",
        )
    if origin is None:
        return value
    _family_allowed(value, origin)
    if feeds(value, origin, origin) and not info.data.get("allow_loop", True):
        raise fault(
            f"output {value} comes back to the rule's own input {origin}",
            "write another interface, group or port, or set allow_loop = true if that is meant",
        )
    return value


def _family_allowed(output: Output, origin: Input) -> None:
    want = _sent_to(output, origin).version
    have = origin.address.version if output.source == "keep" else getattr(output.source, "version", want)
    if want != have:
        raise fault(
            f"output {output} is IPv{want}, its source would be IPv{have}",
            f"leave source out, or write an IPv{want} address",
        )


def _some(value: object) -> object:
    if isinstance(value, list | tuple) and value:
        return value
    if isinstance(value, str | dict):
        raise fault("'to' is one output, not an array of them", f'put it in brackets: to = ["{Output.EXAMPLE}"]')
    raise fault("a rule needs at least one output", f'write for example to = ["{Output.EXAMPLE}"]')


def _distinct(value: tuple[Output, ...]) -> tuple[Output, ...]:
    for output, times in Counter(value).items():
        if times > 1:
            raise fault(f"output {output} stands twice", "remove one of the two")
    return value


class Rule(Table):
    """What the operator wrote: a name, an input, outputs, and what is allowed beyond the default."""

    WHAT: ClassVar[str] = "a rule"
    EXAMPLE: ClassVar[str] = f'{{ name = "a", from = "{Input.EXAMPLE}", to = ["{Output.EXAMPLE}"] }}'

    name: Annotated[str, PlainValidator(_name)] = Field(examples=['"studio-a"'])
    # Before from and to, whose checks read them.
    link_local: bool = Field(default=False, strict=True, examples=["true"])
    allow_loop: bool = Field(default=False, strict=True, examples=["true"])
    rate: Annotated[Rate | None, PlainValidator(read_rate)] = Field(default=None, examples=['"10kpps,50Mbit/s"'])
    health: Annotated[Health | None, PlainValidator(read_health)] = Field(
        default=None, examples=['"rtp,loss=0.1%"']
    )
    from_: Annotated[Input, AfterValidator(_input_allowed)] = Field(
        validation_alias="from", serialization_alias="from", examples=['"eth0:239.1.1.1:5000"']
    )
    to: Annotated[
        tuple[Annotated[Output, AfterValidator(_output_allowed)], ...],
        BeforeValidator(_some),
        AfterValidator(_distinct),
    ] = Field(examples=['["eth1:239.2.2.2:6000"]'])

    def to_table(self) -> dict[str, str | bool | list[str]]:
        """The rule as plain values for TOML or JSON, endpoints as canonical text."""
        allowed = {key: True for key in ("link_local", "allow_loop") if getattr(self, key)}
        return {
            "name": self.name,
            "from": str(self.from_),
            "to": [str(output) for output in self.to],
            **allowed,
            **({"rate": str(self.rate)} if self.rate else {}),
            **({"health": str(self.health)} if self.health else {}),
        }


def check_rules(rules: Sequence[Rule], file: str = "") -> list[Issue]:
    """What is wrong with the rules together: a name used twice, a loop that no rule in it allows."""
    return check_names([rule.name for rule in rules], file) + check_loops(rules, file)


def check_names(names: Sequence[str], file: str) -> list[Issue]:
    """The names used twice; names are in the order of the rules."""
    return [
        Issue(file, name, "name", f"{count} rules have this name", "give each rule a name of its own")
        for name, count in Counter(names).items()
        if count > 1
    ]


def check_loops(rules: Iterable[Rule], file: str) -> list[Issue]:
    """The loops on this host that none of their rules allows."""
    remedy = "change one rule's output, or set allow_loop = true in one of them if that is meant"
    return [
        Issue(file, loop[0].name, "to", f"packets go round: {' -> '.join(rule.name for rule in loop)}", remedy)
        for loop in _loops(rules)
    ]


def _loops(rules: Iterable[Rule]) -> list[list[Rule]]:
    """Loops of two rules and more (a Rule refuses its own), each without a rule of the ones before it."""
    judged = [rule for rule in rules if not rule.allow_loop]
    graph = _graph(judged)
    loops: list[list[Rule]] = []
    while True:
        try:
            graphlib.TopologicalSorter(graph).prepare()
            return loops
        except graphlib.CycleError as error:
            loop: list[int] = error.args[1]
            loops.append([judged[at] for at in loop])
            graph = {at: fed - set(loop) for at, fed in graph.items() if at not in loop}


def _graph(rules: Sequence[Rule]) -> dict[int, set[int]]:
    """For each rule that another feeds, those others; rules by their place, since hashing one takes long."""
    listening: dict[str, list[int]] = defaultdict(list)
    for at, rule in enumerate(rules):
        listening[rule.from_.interface].append(at)
    graph: dict[int, set[int]] = defaultdict(set)
    for at, rule in enumerate(rules):
        for output in rule.to:
            for other in listening.get(output.interface, ()):
                if feeds(output, rule.from_, rules[other].from_):
                    graph[other].add(at)
    return graph
