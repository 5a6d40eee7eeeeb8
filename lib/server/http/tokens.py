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
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import ConfigError

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

    @classmethod
    def read(cls, path: Path) -> TokenFile:
        """Read and check a token file.

        Raises:
            ConfigError: when it cannot be read, is not YAML, or an entry is not valid; never quoting a hash.
        """
        try:
            data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--conf tokens: {str(path)!r} cannot be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--conf tokens: {str(path)!r} is not YAML") from error
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(f"--conf tokens: {str(path)!r}: {where or 'file'}: {problem['msg']}") from error

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token; every entry is compared, so that the time taken says nothing."""
        digest = hash_token(token)
        found = [entry for entry in self.tokens if hmac.compare_digest(entry.sha256, digest)]
        return found[0] if found else None


def hash_token(token: str) -> str:
    """SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def add_token(path: Path, user: str, role: RoleName) -> str:
    """Make a token for a user and add its hash to the file, which is made if it is not there.

    Raises:
        ConfigError: when the file is there but not valid.
    """
    token = secrets.token_urlsafe(32)
    before = TokenFile.read(path).tokens if path.exists() else ()
    entry = TokenEntry(user=user, role=role, sha256=hash_token(token))
    data = {"tokens": [kept.model_dump() for kept in (*before, entry)]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, path)
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
