"""Who runs, in which slot, what is due, and when a request is done: plain Python, no model."""

import itertools
from collections import deque
from collections.abc import Sequence

import pytest
import torch

from csm_core.config import EngineConfig
from csm_core.engine.request import Event, Request, SamplingParams
from csm_core.engine.scheduler import Mark, Progress, Scheduler, cut


def ignore(event: Event) -> None:
    pass


def request(length: int = 5, max_frames: int = 100, follow_up: bool = False) -> Request:
    prompt = torch.zeros(length, 3, dtype=torch.int64)
    return Request(prompt, SamplingParams(max_frames=max_frames), ignore, follow_up=follow_up)


def progress(max_frames: int = 100, schedule: tuple[int, ...] = (1, 2, 4), repeat_limit: int = 5) -> Progress:
    return Progress(request(), 0, max_frames, schedule, repeat_limit)


def scheduler(slots: int = 1, queue_size: int = 2, window: int = 50, batch_buckets: bool = True) -> Scheduler:
    return Scheduler(EngineConfig(slots=slots, queue_size=queue_size, batch_buckets=batch_buckets), window)


def admit(plan: Scheduler) -> tuple[int, Request] | None:
    progress = plan.admit()
    return progress and (progress.slot, progress.request)


def release(plan: Scheduler, slot: int) -> None:
    plan.release(plan.running[slot])


def test_chunks_grow_and_then_stay() -> None:
    running, sizes = progress(), []
    for n in range(1, 20):
        running.add((n, n))
        if chunk := running.take_chunk():
            sizes.append(len(chunk))
    assert sizes == [1, 2, 4, 4, 4, 4]


def test_every_frame_is_delivered_once_and_in_order() -> None:
    running, got = progress(max_frames=12), []
    for n in itertools.count(1):
        running.add((n, 0))
        got += running.take_chunk()
        if running.done:
            break
    assert running.done == "length"
    assert [frame[0] for frame in got] == list(range(1, 13))
    assert running.take_chunk() == []


def test_a_frame_of_zeros_is_the_end_and_no_sound() -> None:
    running = progress(schedule=(10,))
    for frame in [(1, 0), (0, 1), (0, 0)]:
        running.add(frame)
    assert running.done == "eos"
    assert running.take_chunk() == [(1, 0), (0, 1)]


def test_a_stuck_frame_ends_the_take_without_its_repeats() -> None:
    running = progress(schedule=(50,), repeat_limit=4)
    for frame in [(1, 1), (2, 2), (3, 3), (3, 3), (3, 3), (3, 3)]:
        assert running.done is None
        running.add(frame)
    assert running.done == "silence"
    assert running.take_chunk() == [(1, 1), (2, 2), (3, 3)]


def test_repeats_that_were_delivered_stay_delivered() -> None:
    running, got = progress(schedule=(2,), repeat_limit=5), []
    for _ in range(5):
        running.add((3, 3))
        got += running.take_chunk()
    assert running.done == "silence"
    assert got == [(3, 3)] * 4


def test_a_change_starts_the_count_again() -> None:
    running = progress(repeat_limit=3)
    for n in range(30):
        running.add((1 + n // 2 % 2, 1))
    assert running.done is None


def test_lowest_free_slot_in_order_of_arrival() -> None:
    plan = scheduler(slots=2, queue_size=3)
    requests = [request() for _ in range(5)]
    assert all(plan.add(r) for r in requests)
    assert [admit(plan), admit(plan), admit(plan)] == [(0, requests[0]), (1, requests[1]), None]
    release(plan, 0)
    assert admit(plan) == (0, requests[2])
    assert plan.waiting == requests[3:]


def test_follow_ups_are_never_refused_and_go_first() -> None:
    plan = scheduler(slots=1, queue_size=1)
    running, waiting, refused, more = request(), request(), request(), request(follow_up=True)
    assert plan.add(running)
    assert admit(plan) == (0, running)
    assert plan.add(waiting)
    assert not plan.add(refused)
    assert plan.add(more)
    release(plan, 0)
    assert admit(plan) == (0, more)
    release(plan, 0)
    assert admit(plan) == (0, waiting)
    release(plan, 0)
    assert plan.idle


def test_a_free_slot_is_room_without_a_queue() -> None:
    plan = scheduler(slots=2, queue_size=0)
    assert [plan.add(request()) for _ in range(3)] == [True, True, False]


def test_dropped_requests_are_forgotten() -> None:
    plan = scheduler(queue_size=5)
    requests = [request(follow_up=n % 2 == 0) for n in range(4)]
    for r in requests:
        plan.add(r)
    plan.drop(requests[1:3])
    assert plan.waiting == [requests[0], requests[3]]


@pytest.mark.parametrize(("length", "frames"), [(1, 20), (45, 6), (50, 1)])
def test_prompt_and_frames_share_the_window(length: int, frames: int) -> None:
    plan = scheduler(window=50)
    plan.add(request(length=length, max_frames=20))
    plan.admit()
    assert plan.running[0].max_frames == frames


def test_who_speaks_is_stepped_until_all_its_frames_are_launched() -> None:
    plan = scheduler(slots=3)
    for max_frames in (2, 3, 4):
        plan.add(request(max_frames=max_frames))
    first, second, third = (plan.admit() for _ in range(3))
    assert first and second and third
    assert plan.reader() is first
    assert plan.speakers() == []
    third.speaks = first.speaks = True
    assert plan.reader() is second
    assert plan.speakers() == [first, third]
    first.launched = 2
    assert plan.speakers() == [third]
    assert plan.runs(first)
    plan.release(first)
    assert not plan.runs(first)


def test_a_slot_that_is_used_again_belongs_to_its_new_request() -> None:
    plan = scheduler()
    plan.add(request())
    old = plan.admit()
    assert old
    plan.release(old)
    plan.add(request())
    assert plan.admit()
    assert not plan.runs(old)


def taken(state: Sequence[str], batch_buckets: bool = True) -> Scheduler:
    """Slots as described: free, reads or speaks."""
    plan = scheduler(slots=len(state), batch_buckets=batch_buckets)
    for slot, what in enumerate(state):
        if what != "free":
            plan.running[slot] = Progress(request(), slot, 1, (1,), 2, speaks=what == "speaks")
    return plan


def rows(plan: Scheduler) -> int:
    top = max((slot for slot, running in plan.running.items() if running.speaks), default=0)
    return EngineConfig(slots=6).bucket(1 + top)


def test_moves_make_the_step_as_small_as_it_can_be() -> None:
    for state in itertools.product(["free", "reads", "speaks"], repeat=6):
        plan = taken(state)
        # No better than in the lowest slots that nobody reads in:
        usable = [slot for slot, what in enumerate(state) if what != "reads"][: state.count("speaks")]
        best = EngineConfig(slots=6).bucket(1 + max(usable, default=0))
        before, running, moves = rows(plan), set(plan.running.values()), plan.moves()
        assert bool(moves) == (best < before)
        for source, target in moves:
            assert rows(plan) > best  # none more than it takes
            assert plan.running[source].speaks
            assert target < source
            assert target not in plan.running
            plan.move(source, target)
        assert rows(plan) == best
        assert set(plan.running.values()) == running
        assert all(progress.slot == slot for slot, progress in plan.running.items())
        assert plan.moves() == []


def test_without_buckets_nobody_moves() -> None:
    assert taken(["free", "free", "speaks"], batch_buckets=False).moves() == []


MARKS = [Mark(10, b"a"), Mark(13, b"b")]


@pytest.mark.parametrize(
    ("start", "stop", "marks", "wanted"),
    [
        (0, 0, [], []),
        (0, 9, [], [(0, 4), (4, 8), (8, 9)]),
        (0, 18, MARKS, [(0, 4), (4, 8), (8, 10), (10, 13), (13, 17), (17, 18)]),
        (10, 18, MARKS, [(10, 13), (13, 17), (17, 18)]),
        (13, 14, MARKS, [(13, 14)]),
        (13, 13, MARKS, []),
        (0, 13, MARKS, [(0, 4), (4, 8), (8, 10), (10, 13)]),
    ],
)
def test_a_segment_is_cut_alike_whatever_is_known(
    start: int, stop: int, marks: list[Mark], wanted: list[tuple[int, int]]
) -> None:
    assert cut(start, stop, marks, 4) == deque(wanted)
