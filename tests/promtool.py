"""Prometheus's own judge of metrics and alert rules."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def promtool(*arguments: str, text: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """How `promtool ARGUMENTS` ended, given this on its standard input; skips where there is none."""
    found = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("needs promtool")
    return subprocess.run([found, *arguments], input=text, capture_output=True, check=False)
