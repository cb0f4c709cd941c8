"""A rule's `health`: how the health of its streams is measured, and what raises an alarm.

Owns the syntax `FORMAT[,option=value…]` and the same as a table. Called by rule.py; control and protocols.health
use what it says. Nothing here blocks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from mrelay.model.issue import did_you_mean, fault, show

Format = Literal["auto", "rtp", "mpegts", "moldudp64", "sequence", "any"]
FORMATS: Final[tuple[str, ...]] = get_args(Format)
_EXAMPLE: Final = 'write for example health = "rtp", or "rtp,loss=0.1%,jitter=30ms,silence=5s"'
_NUMBER: Final = re.compile(r"[0-9]{1,9}(?:[.][0-9]{1,6})?")
_UNITS: Final = {
    "loss": {"%": 0.01},
    "jitter": {"ms": 0.001, "us": 1e-6, "s": 1.0},
    "silence": {"s": 1.0},
}
_FIELD: Final = ("offset", "size", "endian", "count_offset", "count_size")
_MOST_OFFSET: Final = 65_507  # the largest UDP payload over IPv4


@dataclass(frozen=True, slots=True)
class Health:
    """`loss` is a ratio, `jitter` and `silence` are seconds; 0 where that raises no alarm.

    `sample` N: the stream is heard for one second in N; 1: all of it. `clock`: hertz of RTP timestamps, 0 to go by
    the payload type. The rest, for "sequence", is the field in each datagram: its place and `size` in bytes, and
    those of a count of messages (0 bytes: each datagram is one) by which the number goes on.
    """

    format: Format = "auto"
    loss: float = 0.001
    jitter: float = 0.0
    silence: float = 5.0
    sample: int = 1
    clock: int = 0
    offset: int = 0
    size: int = 0
    endian: Literal["big", "little"] = "big"
    count_offset: int = 0
    count_size: int = 0

    def __str__(self) -> str:
        """As read_health takes it; what is as by default is left out."""
        plain = Health()
        terms = [
            f"{field.name}={_text(field.name, getattr(self, field.name))}"
            for field in fields(self)
            if field.name != "format" and getattr(self, field.name) != getattr(plain, field.name)
        ]
        return ",".join([self.format, *terms])


def read_health(value: object) -> Health | None:
    """The health that text or a table says; None stays None. Raises a fault that says what is wrong with it."""
    if value is None or isinstance(value, Health):
        return value
    if isinstance(value, str):
        options = _split(value)
    elif isinstance(value, Mapping):
        options = {key: one if isinstance(one, str) else show(one) for key, one in value.items()}
        options.setdefault("format", "sequence" if "offset" in options else "auto")
    else:
        raise fault(f"{show(value)} does not say how to measure health", _EXAMPLE)
    return _checked(_read(options))


def _split(text: str) -> dict[str, str]:
    format_, *terms = (term.strip() for term in text.split(","))
    options = {"format": format_}
    for term in terms:
        key, sign, value = term.partition("=")
        if not sign or key in options:
            raise fault(f"{show(term)} is not an option" if not sign else f"{key} stands twice", _EXAMPLE)
        options[key] = value
    return options


def _read(options: Mapping[str, str]) -> Health:
    known = [field.name for field in fields(Health)]
    values: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise fault(f"health has no option {show(key)}", did_you_mean(str(key), known))
        values[key] = _value(key, text)
    return replace(Health(), **values)


def _value(key: str, text: str) -> object:
    match key:
        case "format":
            if text not in FORMATS:
                raise fault(f"{show(text)} is no format of streams", did_you_mean(text, FORMATS))
            return text
        case "endian":
            if text not in ("big", "little"):
                raise fault(f"{show(text)} is no byte order", "write endian=big or endian=little")
            return text
        case "loss" | "jitter" | "silence":
            return _threshold(key, text)
        case "size" | "count_size":
            return _whole(key, text, 8)
        case "sample":
            return _whole(key, text, 3600)
        case "clock":
            return _whole(key, text, 10**9)
    return _whole(key, text, _MOST_OFFSET)


def _whole(key: str, text: str, most: int) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > most:
        problem = f"{key}={text[:60]} is not a whole number up to {most}"
        raise fault(problem, f"write for example {key}={min(4, most)}")
    return int(text)


def _threshold(key: str, text: str) -> float:
    """`off`, or a number and its unit."""
    if text == "off":
        return 0.0
    for unit, factor in _UNITS[key].items():
        number = text.removesuffix(unit).strip()
        if number != text and _NUMBER.fullmatch(number):
            found = round(float(number) * factor, 9)
            if 0 < found <= (1 if key == "loss" else 86_400):
                return found
            break
    example = {"loss": "loss=0.1%", "jitter": "jitter=30ms", "silence": "silence=5s"}[key]
    raise fault(f"{key}={text[:60]} is no threshold", f"write for example {example}, or {key}=off")


def _checked(health: Health) -> Health:
    """What the options say together."""
    given = [key for key in _FIELD if getattr(health, key) != getattr(Health(), key)]
    if health.format != "sequence" and given:
        raise fault(f'{given[0]} is for health = "sequence,…"', f"leave {given[0]} out, or name that format")
    if health.format == "sequence" and health.size == 0:
        raise fault("the sequence number's size is not given", 'write for example "sequence,offset=0,size=4"')
    if health.clock and health.format not in ("rtp", "auto"):
        raise fault("clock is for RTP", "leave clock out")
    if health.sample == 0:
        raise fault("sample=0 hears nothing", "leave sample out to hear all, or write sample=10")
    if health.count_offset and not health.count_size:
        raise fault("the size of the message count is not given", "write for example count_size=2")
    return health


def _text(key: str, value: object) -> str:
    if key not in _UNITS or not isinstance(value, float):
        return str(value)
    if not value:
        return "off"
    unit, factor = next(iter(_UNITS[key].items()))
    return f"{_plain(value / factor)}{unit}"


def _plain(number: float) -> str:
    """Up to six decimals and never an exponent."""
    return f"{number:.6f}".rstrip("0").rstrip(".")
