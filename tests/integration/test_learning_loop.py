"""The learning loop of ``benchmarks/learning_loop.py --quick``, as a test: real server, synthetic cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_loop_publishes_what_is_better_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "loop.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "learning_loop.py"), "--quick", "--out", str(out)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1700)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [point["labels"] for point in data["points"]] == [0, 6, 12]
    published = [version for version in data["versions"] if version["status"] == "published"]
    assert published
    assert all(version["difference"] is None or version["difference"] > 0 for version in published)
    assert data["points"][-1]["mean_dice"] > data["points"][0]["mean_dice"] + 0.05
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "| labels | live version |" in out.with_suffix(".md").read_text(encoding="utf-8")
