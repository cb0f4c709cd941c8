"""What --workers says, as the supervisor hands it on."""

import pytest

from mrelay.control.settings import override
from mrelay.model.config import RelaySettings
from mrelay.model.issue import ConfigError


@pytest.mark.parametrize(("said", "means"), [("auto", "auto"), ("2", 2), ("0,2", [0, 2]), ("1,", [1])])
def test_the_command_line_s_workers(said: str, means: object) -> None:
    assert override(RelaySettings(), None, said).workers == means


@pytest.mark.parametrize("said", [",", "1,,2", "1,x", "x"])
def test_what_workers_may_not_be(said: str) -> None:
    with pytest.raises(ConfigError, match="workers"):
        override(RelaySettings(), None, said)
