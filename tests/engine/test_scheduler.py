"""Who runs, in which slot, what is due, and when a request is done: plain Python, no model."""

import itertools

import pytest
import torch

from csm_core.config import EngineConfig
from csm_core.engine.request import Event, Request, SamplingParams
from csm_core.engine.scheduler import Progress, Scheduler


def ignore(event: Event) -> None:
    pass


def request(length: int = 5, max_frames: int = 100, follow_up: bool = False) -> Request:
    prompt = torch.zeros(length, 3, dtype=torch.int64)
    return Request(prompt, SamplingParams(max_frames=max_frames), ignore, follow_up=follow_up)


def progress(max_frames: int = 100, schedule: tuple[int, ...] = (1, 2, 4), repeat_limit: int = 5) -> Progress:
    return Progress(request(), schedule, repeat_limit, max_frames)


def scheduler(slots: int = 1, queue_size: int = 2, window: int = 50) -> Scheduler:
    return Scheduler(EngineConfig(slots=slots, queue_size=queue_size), window)


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
    assert [plan.admit(), plan.admit(), plan.admit()] == [(0, requests[0]), (1, requests[1]), None]
    assert plan.release(0) is requests[0]
    assert plan.admit() == (0, requests[2])
    assert plan.waiting == requests[3:]


def test_follow_ups_are_never_refused_and_go_first() -> None:
    plan = scheduler(slots=1, queue_size=1)
    running, waiting, refused, more = request(), request(), request(), request(follow_up=True)
    assert plan.add(running)
    assert plan.admit() == (0, running)
    assert plan.add(waiting)
    assert not plan.add(refused)
    assert plan.add(more)
    plan.release(0)
    assert plan.admit() == (0, more)
    plan.release(0)
    assert plan.admit() == (0, waiting)
    plan.release(0)
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
