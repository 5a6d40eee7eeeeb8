"""Which lane takes which work, with given times and without threads."""

from __future__ import annotations

import math

import pytest

from lib.infers.devices.schedule import FIRST_SECONDS, LOADING_SECONDS, Schedule, Work

ONE, TWO = "cuda:0", "cuda:1"
BOTH = (ONE, TWO)
WEIGHTS = ("abdomen", "v1")


def _schedule(*works: Work, lanes: tuple[str, ...] = BOTH) -> Schedule:
    schedule = Schedule(lanes)
    for work in works:
        schedule.add(work)
    return schedule


def _loaded(schedule: Schedule, lane: str, weights: tuple[str, str] = WEIGHTS) -> None:
    schedule.lanes[lane].weights[weights[0]] = weights[1]


def test_two_requests_take_two_lanes_and_the_third_waits() -> None:
    first, second, third = (Work(BOTH) for _ in range(3))
    schedule = _schedule(first, second, third)
    assert schedule.step(0.0) == [first, second]
    assert (first.lane, second.lane, third.lane) == (ONE, TWO, "")
    schedule.end(second, 0.5)
    assert schedule.step(0.5) == [third]
    assert third.lane == TWO


def test_lane_with_the_weights_is_taken_before_the_first() -> None:
    work = Work(BOTH, weights=WEIGHTS)
    schedule = _schedule(work)
    _loaded(schedule, TWO)
    schedule.step(0.0)
    assert (work.lane, work.loads) == (TWO, False)


def test_other_version_of_the_weights_is_loaded_again() -> None:
    work = Work((ONE,), weights=("abdomen", "v2"))
    schedule = _schedule(work)
    _loaded(schedule, ONE)
    schedule.step(0.0)
    assert work.loads
    assert schedule.lanes[ONE].weights == {"abdomen": "v2"}


def test_request_waits_for_loaded_weights_only_where_that_is_sooner() -> None:
    """Loading takes three seconds, by what is known: less than five of them is waited for the lane that has them."""
    for seconds, expected in ((2.0, ""), (5.0, TWO)):
        running, coming = Work((ONE,), weights=WEIGHTS, seconds=seconds), Work(BOTH, weights=WEIGHTS, seconds=1.0)
        schedule = _schedule(running)
        _loaded(schedule, ONE)
        schedule.step(0.0)
        schedule.add(coming)
        schedule.step(0.0)
        assert coming.lane == expected
        assert schedule.lanes[ONE].waiting == (expected == "")


def test_small_image_does_not_wait_behind_a_large_one() -> None:
    large, medium, small = Work(BOTH, seconds=60.0), Work(BOTH, seconds=10.0), Work(BOTH, seconds=1.0)
    schedule = _schedule(large, medium, small)
    schedule.step(0.0)
    assert (large.lane, medium.lane) == (ONE, TWO)
    assert (schedule.lanes[ONE].waiting, schedule.lanes[TWO].waiting) == (0, 1)


def test_lanes_are_given_in_the_order_of_coming_and_nobody_is_overtaken_on_one() -> None:
    works = [Work(BOTH, seconds=float(seconds)) for seconds in (5, 5, 9, 1, 1, 1)]
    schedule, begun, now = _schedule(*works), [], 0.0
    while len(begun) < len(works):
        begun += schedule.step(now)
        now += 1.0
        for lane in schedule.lanes.values():
            if lane.work is not None and now - lane.work.since >= (lane.work.seconds or 0):
                schedule.end(lane.work, now)
    assert begun[:3] == works[:3], "the long one is not put off for the short ones behind it"
    assert begun[3:] == works[3:]


def test_request_for_one_device_does_not_hold_up_those_for_another() -> None:
    running, named, free = Work((ONE,)), Work((ONE,)), Work(BOTH)
    schedule = _schedule(running, named, free)
    assert schedule.step(0.0) == [running, free]
    assert free.lane == TWO


def test_slower_device_is_known_by_what_it_took() -> None:
    schedule = _schedule()
    for lane, took in ((ONE, 8.0), (TWO, 1.0)):
        for _ in range(3):
            done = Work((lane,), seconds=1.0)
            schedule.add(done)
            schedule.step(0.0)
            schedule.end(done, took)
    work = Work(BOTH, seconds=2.0)
    assert schedule.lanes[ONE].computing_seconds(work) == 16.0
    assert schedule.lanes[TWO].computing_seconds(work) == 2.0
    schedule.add(work)
    schedule.step(0.0)
    assert work.lane == TWO


def test_lane_that_has_done_nothing_is_taken_to_be_like_the_others() -> None:
    """Or the first lane would stay the only one that is known to be fast, and get all the work."""
    schedule = _schedule()
    for start, took in ((0.0, 1.5), (10.0, 0.5)):
        work = Work((ONE,), weights=WEIGHTS)
        schedule.add(work)
        schedule.step(start)
        schedule.end(work, start + took)
    other = schedule.lanes[TWO]
    assert (other.computing_seconds(Work(BOTH)), other.loading_seconds()) == (0.5, 0.5)


def test_loading_is_learnt_apart_from_computing() -> None:
    schedule = _schedule()
    for start, took in ((0.0, 7.0), (10.0, 2.0)):
        work = Work((ONE,), weights=WEIGHTS, seconds=2.0)
        schedule.add(work)
        schedule.step(start)
        schedule.end(work, start + took)
    lane = schedule.lanes[ONE]
    assert (lane.loading_seconds(), lane.computing_seconds(Work((ONE,), seconds=2.0))) == (5.0, 2.0)


def test_work_that_takes_longer_than_expected_is_given_more_and_more_time() -> None:
    work = Work((ONE,), seconds=2.0)
    schedule = _schedule(work)
    schedule.step(0.0)
    lane = schedule.lanes[ONE]
    assert [lane.free_at(now) for now in (0.0, 1.5, 4.0, 40.0)] == [2.0, 2.0, 5.0, 50.0]


def test_waiter_moves_to_an_idle_lane_when_the_loaded_one_takes_too_long() -> None:
    running, waiting = Work((ONE,), weights=WEIGHTS, seconds=1.0), Work(BOTH, weights=WEIGHTS, seconds=1.0)
    schedule = _schedule(running)
    _loaded(schedule, ONE)
    schedule.step(0.0)
    schedule.add(waiting)
    assert schedule.step(0.0) == []
    assert schedule.step(4 * LOADING_SECONDS + 1) == [waiting]
    assert waiting.lane == TWO


def test_same_image_waits_for_the_lane_that_computes_it() -> None:
    first, again = Work(BOTH, what="a"), Work(BOTH, what="a")
    schedule = _schedule(first, again)
    assert schedule.step(0.0) == [first]
    assert schedule.lanes[ONE].waiting == 1


def test_work_ahead_takes_what_is_idle_and_ends_when_a_request_has_no_other_lane() -> None:
    ahead, more, request, second = Work(BOTH, "a", ahead=True), Work(BOTH, "b", ahead=True), Work(BOTH), Work(BOTH)
    schedule = _schedule(ahead, request)
    schedule.step(0.0)
    assert (request.lane, ahead.lane) == (ONE, TWO), "the request chose first, whoever came first"
    schedule.add(more)
    schedule.add(second)
    schedule.step(0.0)
    assert ahead.ends and not more.lane
    schedule.end(ahead, 1.0, finished=False)
    schedule.add(ahead)
    assert schedule.step(1.0) == [second]
    assert not ahead.ends and not ahead.lane


def test_request_leaves_work_ahead_alone_where_a_lane_is_idle() -> None:
    ahead, request = Work(BOTH, "a", ahead=True), Work(BOTH, "b")
    schedule = _schedule(ahead)
    schedule.step(0.0)
    schedule.add(request)
    assert schedule.step(0.0) == [request]
    assert not ahead.ends


def test_request_for_what_is_computed_ahead_waits_for_it() -> None:
    ahead, request = Work(BOTH, "a", ahead=True), Work(BOTH, "a")
    schedule = _schedule(ahead)
    schedule.step(0.0)
    schedule.add(request)
    assert schedule.step(0.0) == []
    assert not ahead.ends
    schedule.end(ahead, 1.0)
    assert schedule.step(1.0) == [request]


def test_device_with_a_training_on_it_is_taken_last() -> None:
    first, second = Work(BOTH), Work(BOTH)
    schedule = _schedule(first)
    schedule.lanes[ONE].occupied = True
    schedule.step(0.0)
    assert first.lane == TWO
    schedule.add(second)
    assert schedule.step(0.0) == [second]
    assert second.lane == ONE, "sooner than waiting"


def test_failed_lane_is_out_and_what_it_did_goes_first_elsewhere() -> None:
    works = [Work(BOTH, seconds=1.0) for _ in range(4)]
    schedule = _schedule(*works)
    schedule.step(0.0)
    schedule.fail(ONE, "CUDA error", 0.5)
    schedule.end(works[0], 0.5, finished=False)
    schedule.add(works[0])
    assert schedule.step(0.5) == []
    schedule.end(works[1], 1.0)
    assert schedule.step(1.0) == [works[0]], "it keeps its place in the queue"
    assert works[0].lane == TWO


def test_failed_lane_is_tried_again_after_twice_as_long_each_time_and_forgets_its_weights() -> None:
    schedule = _schedule()
    _loaded(schedule, ONE)
    schedule.fail(ONE, "it", 0.0, 30.0)
    assert (schedule.due(29.0), schedule.due(30.0)) == ([], [ONE])
    schedule.postpone(ONE, "it", 30.0, 30.0)
    assert (schedule.due(89.0), schedule.due(90.0)) == ([], [ONE])
    schedule.restore(ONE)
    work = Work(BOTH, weights=WEIGHTS)
    schedule.add(work)
    assert schedule.step(90.0) == [work]
    assert (work.lane, work.loads) == (ONE, True)
    assert schedule.lanes[ONE].failures == 1
    schedule.end(work, 91.0)
    schedule.fail(ONE, "it", 100.0, 30.0)
    assert schedule.due(130.0) == [ONE], "what worked in between begins anew"


def test_work_does_not_go_back_to_the_lane_that_it_failed_on() -> None:
    work = Work(BOTH, tried={ONE})
    schedule = _schedule(work)
    schedule.step(0.0)
    assert work.lane == TWO


def test_seconds_until_free_are_shared_out_among_lanes_that_work() -> None:
    schedule = _schedule(*(Work(BOTH, seconds=4.0) for _ in range(4)))
    schedule.step(0.0)
    assert schedule.seconds_until_free(BOTH, 0.0) == 8.0
    schedule.fail(TWO, "it", 0.0)
    assert schedule.seconds_until_free(BOTH, 0.0) == 12.0
    schedule.fail(ONE, "it", 0.0)
    assert math.isinf(schedule.seconds_until_free(BOTH, 0.0))
    assert Schedule([ONE]).seconds_until_free([ONE], 0.0) == 0.0


@pytest.mark.parametrize("finished", [True, False])
def test_only_finished_work_says_something_of_speed(finished: bool) -> None:
    work = Work((ONE,))
    schedule = _schedule(work)
    schedule.step(0.0)
    schedule.end(work, 9.0, finished)
    assert schedule.lanes[ONE].computing_seconds(Work((ONE,))) == (9.0 if finished else FIRST_SECONDS)
    assert schedule.lanes[ONE].done == finished
