"""`mrelay completion`: the completion script of a shell, made by cyclopts. Blocks on nothing."""

from typing import Literal

from mrelay.cli import app


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the script.

    Args:
        shell: Which shell's script.
    """
    print(app.generate_completion(shell=shell))
