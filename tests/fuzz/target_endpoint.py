"""Endpoint and rate texts: refused with a remedy, or equal to what their canonical text says."""

import re

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from fuzz.data import Data
from mrelay.model.endpoint import Input, Output
from mrelay.model.issue import issues_of
from mrelay.model.rate import Rate, read_rate


def check(data: bytes) -> None:
    kind = Data(data[:1]).below(3)
    text = data[1:].decode(errors="replace")
    if kind == 2:
        _rate(text)
        return
    model: type[Input | Output] = (Input, Output)[kind]
    try:
        endpoint = model.parse(text)
    except ValidationError as error:
        issues = issues_of(error, "")
        assert issues
        assert all(issue.problem and issue.remedy for issue in issues)
        "\n".join(map(str, issues)).encode()  # can be shown
        return
    assert model.parse(str(endpoint)) == endpoint, text
    _lawful(endpoint)


def _lawful(endpoint: Input | Output) -> None:
    assert re.fullmatch(r"[^\s/:@,*\[\]]{1,15}", endpoint.interface)
    assert endpoint.interface.isascii()
    if isinstance(endpoint, Input):
        assert 1 <= endpoint.ports.low <= endpoint.ports.high <= 65535
        assert endpoint.vlan is None or 1 <= endpoint.vlan <= 4094
        assert endpoint.address.is_multicast or endpoint.address.num_addresses == 1
        return
    assert endpoint.port is None or 1 <= endpoint.port <= 65535
    assert endpoint.ttl is None or 1 <= endpoint.ttl <= 255
    assert endpoint.dscp is None or 0 <= endpoint.dscp <= 63
    assert endpoint.address is None or not endpoint.address.is_unspecified


def _rate(text: str) -> None:
    try:
        rate = read_rate(text)
    except PydanticCustomError as error:
        str(error).encode()
        return
    assert isinstance(rate, Rate)
    assert 0 < max(rate.packets, rate.bits) <= 10**12
    assert read_rate(str(rate)) == rate
