"""What --workers says, as the supervisor hands it on; what of `xdp` does nothing."""

import pytest

from mrelay.control.settings import idle_xdp, override
from mrelay.model.config import RelaySettings
from mrelay.model.issue import ConfigError


@pytest.mark.parametrize(("said", "means"), [("auto", "auto"), ("2", 2), ("0,2", [0, 2]), ("1,", [1])])
def test_the_command_line_s_workers(said: str, means: object) -> None:
    assert override(RelaySettings(), None, said).workers == means


@pytest.mark.parametrize("said", [",", "1,,2", "1,x", "x"])
def test_what_workers_may_not_be(said: str) -> None:
    with pytest.raises(ConfigError, match="workers"):
        override(RelaySettings(), None, said)


@pytest.mark.parametrize(
    ("wanted", "fast", "said"),
    [
        (False, False, []),
        (True, True, []),
        (("eth0",), True, []),
        (("eth0", "eth7"), True, ["eth7"]),
        (True, False, ["xdp"]),
    ],
)
def test_xdp_that_does_nothing(wanted: bool | tuple[str, ...], fast: bool, said: list[str]) -> None:
    problems = idle_xdp(wanted, {"eth0"}, fast)
    assert [word in problem for word, problem in zip(said, problems, strict=True)] == [True] * len(said)
