"""The tokens of those who come over TCP: who may look, and who may change things.

Owns the file `tokens` in the state directory, which it reaches by descriptor alone. Called by tcp, at the start
and at each reload. Blocks for file I/O: call it in a thread.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from typing import Final, Literal, get_args

log = logging.getLogger(__name__)

NAME: Final = "tokens"
Kind = Literal["look", "change"]
KINDS: Final = get_args(Kind)
_LINE: Final = re.compile(r"(look|change)\s+([A-Za-z0-9._~+/-]{32,256}=*)", re.ASCII)  # RFC 6750 §2.1: b64token
_TEXT: Final = """\
# What mrelay's page, the API and /metrics ask for over TCP. Who has a token of 'look' may look, of 'change' also
# change rules. A line for each token, as many as you like; 'systemctl reload mrelay' (SIGHUP) reads it again.
look {look}
change {change}
"""


class BadTokens(Exception):
    """The file can't be used: why, and what would help."""


class Tokens:
    """Tokens by what they allow; only their digests are kept."""

    def __init__(self, tokens: list[tuple[Kind, str]]) -> None:
        self._digests = [(kind, _digest(token.encode())) for kind, token in tokens]

    def kind_of(self, token: bytes) -> Kind | None:
        """What it allows; None for one that there is not. Takes as long for the one as for the other."""
        digest = _digest(token)
        found = {kind for kind, known in self._digests if hmac.compare_digest(known, digest)}
        return "change" if "change" in found else "look" if found else None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def load(directory: int) -> Tokens:
    """Those of the file, which is made with one of each when there is none. BadTokens, OSError."""
    try:
        fd = os.open(NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        _make(directory)
        return load(directory)
    with os.fdopen(fd, "rb") as file:
        if os.fstat(fd).st_mode & 0o077:
            log.warning("others may read or write the file %s in the state directory: chmod 600 it", NAME)
        return parse(file.read(1 << 20).decode(errors="replace"))


def parse(text: str) -> Tokens:
    """The tokens that the file's text says; BadTokens names the first line that is wrong."""
    tokens: list[tuple[Kind, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            remedy = "write 'look' or 'change' and a token of at least 32 letters and digits: openssl rand -hex 32"
            raise BadTokens(f"line {number} of the file {NAME} is no token — {remedy}")
        tokens.append(("change" if found[1] == "change" else "look", found[2]))
    return Tokens(tokens)


def _make(directory: int) -> None:
    """All or nothing, also through a power cut; for control's user alone."""
    text = _TEXT.format(**{kind: secrets.token_urlsafe(32) for kind in KINDS})
    new = f"{NAME}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(new, flags, 0o600, dir_fd=directory), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, NAME, src_dir_fd=directory, dst_dir_fd=directory)
    os.fsync(directory)
