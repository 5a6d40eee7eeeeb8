"""Prompts and seconds are counted from hand-out to submission, for each client and case."""

from __future__ import annotations

from pathlib import Path

from lib.datastore.effort import Effort, EffortCounter


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_prompts_and_seconds_are_counted_from_hand_out_to_submission(tmp_path: Path) -> None:
    clock = Clock()
    counter = EffortCounter(tmp_path / "effort.sqlite", clock)
    counter.hand_out("case", "anna")
    clock.time += 60
    counter.hand_out("case", "anna")  # she asked for the next sample again, and got the one that she has
    for _ in range(3):
        counter.count_prompt("case", "anna")
    counter.count_prompt("other", "anna")
    counter.count_prompt("case", "bert")
    clock.time += 30
    assert counter.find("case", "anna") == Effort(3, 90.0)
    assert counter.find("other", "anna") == counter.find("case", "bert") == Effort(1, None)
    counter.close()
    again = EffortCounter(tmp_path / "effort.sqlite", clock)
    assert again.find("case", "anna") == Effort(3, 90.0), "a restart loses nothing"
    again.finish("case", "anna")
    assert again.find("case", "anna") == Effort(0, None) and again.find("case", "bert") == Effort(1, None)
    again.close()


def test_clock_that_is_put_back_gives_no_negative_time() -> None:
    clock = Clock()
    counter = EffortCounter(now=clock)
    counter.hand_out("case", "anna")
    clock.time -= 500
    assert counter.find("case", "anna") == Effort(0, 0.0)
    counter.close()
