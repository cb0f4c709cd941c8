"""Messages between roles: one of the declared types with the declared fields, or BadMessage."""

import dataclasses
import json

from mrelay import messages
from mrelay.wire import BadMessage, decode, encode


def check(data: bytes) -> None:
    try:
        message = decode(data)
    except BadMessage:
        return
    assert json.loads(data)["v"] == messages.VERSION
    _typed(message)
    assert decode(encode(message)) == message


def _typed(value: object) -> None:
    """No value of another type than a message may hold: in particular no float, list or dict."""
    if isinstance(value, tuple):
        for item in value:
            _typed(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            assert field.type is not int or type(item) is int
            assert field.type is not bool or type(item) is bool
            _typed(item)
    else:
        assert value is None or type(value) in {int, bool, str}
