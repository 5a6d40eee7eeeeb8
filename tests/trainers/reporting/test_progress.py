"""What a run says: a line for people, JSON for programs, TensorBoard for curves."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lib.storage.json_files import without_nan, write_json
from lib.trainers.reporting.progress import CURVE_FILE, Progress, ProgressReporter, format_seconds, read_curve

START = Progress(
    epoch=3,
    max_epochs=50,
    step=120,
    total_steps=2000,
    loss=0.51234,
    learning_rate=1e-3,
    eta_seconds=754,
    dice={"anterior": 0.8612, "posterior": math.nan},
    best_mean_dice=0.85,
)


def test_line_names_epoch_step_loss_dice_and_the_time_left() -> None:
    assert START.describe() == ("epoch 3/50 step 120/2000 loss 0.5123 dice anterior 0.861 posterior nan eta 12m34s")


def test_line_without_validation_has_no_dice() -> None:
    assert replace(START, dice={}).describe() == "epoch 3/50 step 120/2000 loss 0.5123 eta 12m34s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3720, "1h02m"),
        (90_061, "25h01m"),
        (math.inf, "unknown"),
    ],
)
def test_seconds_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_json_has_no_nan_at_any_depth(tmp_path: Path) -> None:
    data = {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], 3: (1, "x", None, True)}
    expected = {"a": None, "b": [1.5, None, {"c": None}], "3": [1, "x", None, True]}
    assert without_nan(data) == expected
    write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_reporter_writes_log_json_and_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="unetr.train")
    reporter = ProgressReporter(tmp_path / "run")
    for step in range(1, 6):
        reporter.step(replace(START, step=step))
    reporter.validation(replace(START, step=6))
    reporter.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("epoch 3/50 step 1/2000")
    assert lines[-1].startswith("epoch 3/50 step 6/2000")
    assert len(lines) == 2, "the log is spared between lines"
    assert json.loads((tmp_path / "run" / "progress.json").read_text(encoding="utf-8"))["step"] == 6

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert events.Scalars("validation/dice_anterior")[0].value == pytest.approx(0.8612)


def test_reporter_says_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="unetr.train")
    reporter = ProgressReporter(tmp_path)
    for step in (1, 2, 3):
        reporter.step(replace(START, step=step, total_steps=3))
    reporter.close()
    assert "step 3/3" in caplog.records[-1].getMessage()


def test_curve_grows_with_the_run_and_counts_a_repeated_step_once(tmp_path: Path) -> None:
    assert read_curve(tmp_path) == []
    reporter = ProgressReporter(tmp_path)
    for step, loss in ((1, 0.9), (2, 0.75), (2, 0.7)):
        reporter.validation(replace(START, step=step, loss=loss))
    reporter.close()
    with (tmp_path / CURVE_FILE).open("a") as file:
        file.write("3,0.")  # cut off by a kill
        file.write("\n4")
    assert read_curve(tmp_path) == [(1, 0.9), (2, 0.7), (3, 0.0)]
