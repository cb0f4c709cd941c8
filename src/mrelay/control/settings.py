"""The `[relay]` settings as they hold for this run: command line over file. Pure; called by main."""

from collections.abc import Collection

from pydantic import ValidationError

from mrelay.model.config import RelaySettings
from mrelay.model.issue import ConfigError, Issue, issues_of

AUTO_WORKERS = 4  # at most; more only help with many busy flows


def override(settings: RelaySettings, engine: str | None, workers: str | None) -> RelaySettings:
    """The settings with what --engine and --workers say; ConfigError when they can't be."""
    flags = {key: value for key, value in (("engine", engine), ("workers", workers)) if value is not None}
    try:
        return RelaySettings.model_validate({**settings.model_dump(), **flags})
    except ValidationError as error:
        raise ConfigError(issues_of(error, "command line")) from None


def idle_xdp(wanted: bool | tuple[str, ...], inputs: Collection[str], fast: bool) -> list[str]:
    """What of the setting `xdp` does nothing now, each with the remedy. `inputs`: interfaces with rules."""
    if wanted and not fast:
        return ["xdp does nothing without the kernel's fast path: leave it out, or see why there is none above"]
    named = () if isinstance(wanted, bool) else wanted
    return [f"xdp names {name}, but no rule has its input there" for name in named if name not in inputs]


def choose_cores(wanted: str | int | list[int], available: Collection[int], file: str) -> tuple[int, ...]:
    """The cores for the setting `workers`; ConfigError when the host hasn't got them."""
    cores = sorted(available)
    if isinstance(wanted, list):
        if missing := set(wanted) - set(cores):
            raise _refused(file, f"core {_join(missing)} is not available", f"choose from {_join(cores)}")
        return tuple(wanted)
    count = min(AUTO_WORKERS, max(1, len(cores) - 1)) if isinstance(wanted, str) else wanted
    if count > len(cores):
        problem = f"{count} workers were asked for, {len(cores)} cores are available"
        raise _refused(file, problem, f"write auto, or 1 to {len(cores)}")
    return tuple(cores[-count:])  # the first cores serve the host's own interrupts


def _join(cores: Collection[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


def _refused(file: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Issue(file, "", "workers", problem, remedy)])
