"""The token file: who may use the server, as which role, with the SHA-256 of a random token.

    tokens:
      - user: anna
        role: annotator     # or reviewer, admin
        sha256: 9f86d08...  # of the token; the token itself is nowhere in the file

``python -m lib.server.http.tokens tokens.yaml anna annotator`` makes a token, adds its hash to the file and prints
the token once. A plain SHA-256 is enough because the tokens are random (256 bits), unlike passwords.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import secrets
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib.configs.yaml_files import read_yaml
from lib.errors import ConfigError
from lib.storage.files import replacing

logger = logging.getLogger("unetr.server")

RoleName = Literal["annotator", "reviewer", "admin"]


class TokenEntry(BaseModel):
    """One user's token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: Annotated[str, Field(pattern=r"^[\w.@ -]{1,100}$")]
    role: RoleName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TokenFile(BaseModel):
    """All users' tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenEntry, ...]

    @field_validator("tokens", mode="before")
    @classmethod
    def _nobody(cls, value: Any) -> Any:
        """Treat ``tokens:`` without a value, which remains when all entries are removed, as an empty list."""
        return () if value is None else value

    @classmethod
    def read(cls, path: Path) -> TokenFile:
        """Read and validate a token file.

        Raises:
            ConfigError: if it cannot be read, is not YAML, or has an invalid entry; it never quotes a hash.
        """
        data = read_yaml(path, f"--conf tokens: {str(path)!r}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(f"--conf tokens: {str(path)!r}: {where or 'file'}: {problem['msg']}") from error

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token; every entry is compared, so that the duration reveals nothing."""
        digest = hash_token(token)
        entries = [entry for entry in self.tokens if hmac.compare_digest(entry.sha256, digest)]
        return entries[0] if entries else None


class WatchedTokens:
    """The token file of a running server, read again after changes, so that a removed token is invalid at once.

    With a missing or invalid file, all tokens are refused until it is valid again; the log states the reason.

    Args:
        path: the token file.

    Raises:
        ConfigError: if it is invalid at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = self._state()
        self._file = TokenFile.read(path)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self._file.tokens)

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token in the current file."""
        with self._lock:
            if self._seen != (state := self._state()):
                self._seen, self._file = state, self._read()
            return self._file.find(token)

    def read_again(self) -> None:
        """Read the file again, even if it looks unchanged (for example on a network drive)."""
        self._seen = None

    def _state(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size

    def _read(self) -> TokenFile:
        try:
            file = TokenFile.read(self._path)
        except ConfigError as error:
            logger.error("nobody may use this server until its token file is valid again: %s", error)
            return TokenFile(tokens=())
        logger.info("the token file %s was read again: %d tokens", self._path, len(file.tokens))
        return file


def hash_token(token: str) -> str:
    """SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def add_token(path: Path, user: str, role: RoleName) -> str:
    """Create a token for a user and add its hash to the file, which is created if necessary.

    Raises:
        ConfigError: if the file exists but is invalid.
    """
    token = secrets.token_urlsafe(32)
    before = TokenFile.read(path).tokens if path.exists() else ()
    entry = TokenEntry(user=user, role=role, sha256=hash_token(token))
    data = {"tokens": [kept.model_dump() for kept in (*before, entry)]}
    with replacing(path, mode=0o600) as file:
        file.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode("utf-8"))
    return token


def main() -> int:
    """``python -m lib.server.http.tokens FILE USER ROLE``: add a token and print it."""
    parser = argparse.ArgumentParser(description="Make a token for a user and add its hash to a token file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("user")
    parser.add_argument("role", choices=("annotator", "reviewer", "admin"))
    options = parser.parse_args()
    try:
        print(add_token(options.file, options.user, options.role))
    except (ConfigError, ValidationError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
