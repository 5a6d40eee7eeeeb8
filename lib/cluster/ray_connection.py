"""Imports Ray, which is optional, and connects to a cluster, with token authentication if the cluster requires it."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.errors import ConfigError

LIBRARY = Path(__file__).resolve().parents[1]
SECONDS_TO_ANSWER = 5.0
OUTSIDE = "ray://"
HOW_TO_GIVE_A_TOKEN = (
    "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names "
    "(~/.ray/auth_token where it is not set)"
)


@dataclass(frozen=True)
class Authentication:
    """Ray's authentication settings in the environment; the token itself is not read.

    Attributes:
        asked: whether Ray uses token authentication.
        source: source of the token: ``RAY_AUTH_TOKEN``, or a file.
        given: whether there is a token.
    """

    asked: bool
    source: str
    given: bool

    @classmethod
    def find(cls, environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Authentication:
        """The settings by Ray's own rules: an existing token is used, unless ``RAY_AUTH_MODE`` disables it.

        Args:
            environment: environment variables.
            home: folder in which Ray looks for its token; by default this user's home.
        """
        file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
        from_variable = bool(environment.get("RAY_AUTH_TOKEN"))
        given = from_variable or _has_text(file)
        mode = environment.get("RAY_AUTH_MODE", "token" if given else "").lower()
        return cls(mode == "token", "RAY_AUTH_TOKEN" if from_variable else str(file), given)

    def describe(self) -> str:
        """The likely reason if a cluster with token authentication refuses this process."""
        if not self.asked:
            return "none is given, since RAY_AUTH_MODE is not 'token'"
        return f"the one in {self.source} is not the cluster's" if self.given else f"there is none in {self.source}"


def _has_text(file: Path) -> bool:
    try:
        return file.is_file() and bool(file.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False


def import_ray() -> Any:
    """Import Ray, which is optional.

    Raises:
        ConfigError: if it is not installed.
    """
    os.environ.setdefault(
        "RAY_USAGE_STATS_ENABLED", "0"
    )  # set before the import, since Ray would send usage statistics
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed; python3 run.py setup --cluster installs it") from error
    return ray


@contextmanager
def connected(ray: Any, address: str) -> Iterator[None]:
    """Connect to the cluster for the duration of the block, unless there is a connection already.

    Raises:
        ConfigError: if the cluster cannot be reached, or refuses this process.
    """
    if ray.is_initialized():
        yield
        return
    _connect(ray, address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    _check_listens(address)
    environment = {
        "py_modules": [str(LIBRARY)],  # so that all nodes run the same code
        "excludes": ["**/__pycache__/**"],
        "env_vars": {"OMP_WAIT_POLICY": "passive"},
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error names the unreachable address
            ray.init(address=address, runtime_env=environment, logging_level=logging.WARNING, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(_refusal(address, error)) from error


def _check_listens(address: str) -> None:
    """Refuse an address on which nothing listens at once, since Ray itself would try for half a minute.

    Raises:
        ConfigError: naming the reason.
    """
    host, port = _endpoint(address)
    if not port:
        return
    try:
        socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"there is no Ray cluster to be reached at {address!r}: {reason}") from error


def _endpoint(address: str) -> tuple[str, int]:
    """Host and port of an address; port 0 if it has none, as ``auto``.

    Raises:
        ConfigError: for an invalid address.
    """
    if address in ("auto", "local"):
        return "", 0
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.scheme in ("", "ray") and parts.hostname and parts.port and not parts.path:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"{address!r} is no address of a Ray cluster; valid: auto, HOST:PORT, ray://HOST:PORT, local")


def _refusal(address: str, error: BaseException) -> str:
    """A sentence on why a cluster cannot be used."""
    authentication = Authentication.find()
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(type(one).__name__ == "AuthenticationError" or "InvalidAuthToken" in str(one) for one in chain):
        return (
            f"the Ray cluster at {address!r} asks for a token, and {authentication.describe()}: {HOW_TO_GIVE_A_TOKEN}"
        )
    reason = " ".join(str(error).split())[:300]
    if address.startswith(OUTSIDE) and "timeout" in reason:
        # Ray's client retries with a refused token without an error message
        given = f"; if it asks for a token, {authentication.describe()}: {HOW_TO_GIVE_A_TOKEN}"
        return f"what listens at {address!r} does not let this program in, or is no Ray cluster ({reason}){given}"
    return f"there is no Ray cluster to be reached at {address!r}: {reason}"
