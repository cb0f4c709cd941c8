"""What is wrong with a rule or a setting, and what to do about it.

Owns Issue (what people are shown), Table (the base of every model that a TOML or JSON table fills) and
fault() (what a validator raises). Called by the other files in this package and by whoever shows a
pydantic.ValidationError to a person. Nothing here blocks.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

FAULT = "fault"  # the type of every error that a Table raises


@dataclass(frozen=True)
class Issue:
    """One thing wrong. rule is the rule's name, 'rule 3' where it has none, empty outside rules."""

    file: str
    rule: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        # A name holds no space, so 'rule 3' can't be mistaken for one.
        rule = self.rule if " " in self.rule else f"rule '{self.rule}'"
        place = ", ".join(filter(None, [self.rule and rule, self.key and f"key '{self.key}'"]))
        return ": ".join(filter(None, [self.file, place, f"{self.problem} — {self.remedy}"]))


class ConfigError(Exception):
    """A file, or the rules in a request, is refused; issues says everything that is wrong with it."""

    def __init__(self, issues: list[Issue]) -> None:
        super().__init__("\n".join(map(str, issues)))
        self.issues = issues


def fault(problem: str, remedy: str) -> PydanticCustomError:
    """The error that a validator raises: what is wrong, and what to write instead."""
    return PydanticCustomError(FAULT, "{problem} — {remedy}", {"problem": problem, "remedy": remedy})


def show(value: object) -> str:
    """A value as the operator wrote it, short enough for one line."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int() if abs(value) > 10**18:
            return "a huge number"  # and Python refuses to print the largest
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case int() | float():
            return repr(value)
        case dict() | BaseModel():
            return "a table"
        case list() | tuple():
            return "an array"
    return f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A remedy for a word that is none of the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(word.lower(), known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


class Table(BaseModel):
    """A frozen model that refuses unknown keys; each of its errors is a fault, so has a remedy.

    Give every field `examples=[text]`, right TOML for that key; the first is shown when it is missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)
    WHAT: ClassVar[str] = "this table"
    EXAMPLE: ClassVar[str] = "{ }"

    @classmethod
    def read(cls, data: object) -> Self:
        """The model of what an operator wrote: only under TOML's keys, not the fields' names in code."""
        return cls.model_validate(data, by_alias=True, by_name=False)

    @model_validator(mode="wrap")
    @classmethod
    def _only_faults(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = [cls._fault(detail) for detail in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    @classmethod
    def _fault(cls, detail: ErrorDetails) -> InitErrorDetails:
        """Turn one of pydantic's own errors into a fault; the nested tables' are faults already."""
        if detail["type"] == FAULT:
            error = fault(detail["ctx"]["problem"], detail["ctx"]["remedy"])
        else:
            error = cls._explain(detail["type"], str(detail["loc"][0]) if detail["loc"] else "", detail)
        return InitErrorDetails(type=error, loc=detail["loc"], input=None)

    @classmethod
    def _explain(cls, kind: str, key: str, detail: ErrorDetails) -> PydanticCustomError:
        fields = {str(field.validation_alias or name): field for name, field in cls.model_fields.items()}
        example = f"{key} = {(fields[key].examples or ['…'])[0]}" if key in fields else cls.EXAMPLE
        if kind == "missing":
            return fault("is missing", f"add {example}")
        if kind == "extra_forbidden":
            return fault(f"{cls.WHAT} has no key {show(key)}", did_you_mean(key, fields))
        return fault(f"{show(detail['input'])} does not fit here", f"write for example {example}")


def issues_of(error: ValidationError, file: str = "", rule: str = "", key: str = "") -> list[Issue]:
    """Every fault in a Table's ValidationError, as issues; key is where the table itself stands."""
    return [
        Issue(file, rule, _key(key, detail["loc"]), detail["ctx"]["problem"], detail["ctx"]["remedy"])
        for detail in error.errors(include_url=False)
    ]


def _key(start: str, loc: tuple[int | str, ...]) -> str:
    """('to', 0, 'ttl') -> 'to[0].ttl'."""
    for part in loc:
        start += f"[{part}]" if isinstance(part, int) else f".{part}" if start else part
    return start
