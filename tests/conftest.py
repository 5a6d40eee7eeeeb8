"""How pytest runs here: processes of pytest-xdist are forks, and a failure shows what servers have logged.

The fixtures of all tests are in ``tests/fixtures.py``.
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Generator

import pytest

from tests.forks import FORKED_PYTHON, start_starter
from tests.server_logs import LOGS

LONG = frozenset({"browser", "cluster", "integration", "trainers"})
"""Folders of tests that take most of the time."""


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist start its processes as forks, which have imported the libraries; only these import fixtures."""
    runs_tests = hasattr(config, "workerinput") or not config.getoption("tx", None) or config.option.collectonly
    if not runs_tests and sys.platform == "linux":
        start_starter()
        config.option.tx = [f"popen//python={shlex.quote(str(FORKED_PYTHON))} --fork" for _ in config.option.tx]
    if runs_tests:
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, begin with long files: one that came last would leave the others idle."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONG.isdisjoint(item.path.parts))


def pytest_collection_finish() -> None:
    """Leave the libraries and the collected tests out of garbage collections.

    Every measurement of memory begins with one, which took a third of a second with them.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_logstart() -> None:
    """What servers have written so far belongs to earlier tests."""
    LOGS.begin_test()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure what the test's servers have logged."""
    report = yield
    if report.failed:
        report.sections.extend(LOGS.sections())
    return report


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name content by its length: what a compressor writes holds the time, and workers must collect the same names."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) and len(val) > 16 else None
