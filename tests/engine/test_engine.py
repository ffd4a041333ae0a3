"""The thread and its loop: every accepted request ends exactly once, whatever happens to it or to its neighbours."""

import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csm_core.codec import Codec
from csm_core.config import EngineConfig, ModelConfig
from csm_core.engine.engine import Engine
from csm_core.engine.request import Chunk, End, Event, Failure, Request, SamplingParams
from csm_core.errors import CsmError, EngineBusyError, EngineError, InvalidInputError, PromptTooLongError
from csm_core.model.csm import ABSENT, CSM

PATIENCE = 60.0  # seconds until a test gives up; nothing here takes one


class Scripted(CSM):
    """A real CSM up to the choice of codes, which the test makes: ``script(text of the row's last frame, frame)``.

    The text token of the prompt's last frame (10 and up) tells the rows apart; ``script`` may raise or wait.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.script: Callable[[int, int], tuple[int, int]] = lambda who, frame: (1 + frame % 60, who)
        self.on_prefill: Callable[[torch.Tensor], None] = lambda frames: None
        self.made: dict[int, int] = {}
        self._rows: list[int] = []

    def forward_backbone(self, frames: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if frames.shape[1] > 1:
            self.on_prefill(frames)
        else:  # the row's owner is the text token at first, and the second code of every frame it makes
            self._rows = [int(row[0, -1] if row[0, -1] != ABSENT else row[0, 1]) for row in frames]
            self.made.update({who: 0 for who, row in zip(self._rows, frames, strict=True) if row[0, -1] != ABSENT})
        return super().forward_backbone(frames, *args, **kwargs)  # type: ignore[arg-type]

    def decode_frame(self, hidden: torch.Tensor, pick: object) -> torch.Tensor:
        frames = [self.script(who, self.made[who]) for who in self._rows]
        for who in self._rows:
            self.made[who] += 1
        return torch.tensor(frames)


class Heard:
    """A request's events as they came."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.queue: SimpleQueue[Event] = SimpleQueue()

    def emit(self, event: Event) -> None:
        self.events.append(event)
        self.queue.put(event)

    def last(self) -> End | Failure:
        """Wait for the end, and see that nothing follows it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                event = self.queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise AssertionError("the request did not end") from None
            if isinstance(event, End | Failure):
                return event

    @property
    def chunks(self) -> list[Chunk]:
        return [event for event in self.events if isinstance(event, Chunk)]

    @property
    def codes(self) -> list[list[int]]:
        return [frame for chunk in self.chunks for frame in chunk.codes.tolist()]


def wish(who: int, heard: Heard, length: int = 4, follow_up: bool = False, **params: int) -> Request:
    prompt = torch.full((length, 3), ABSENT)
    prompt[:, -1] = who
    values = {"max_frames": 10, "seed": who, **params}
    return Request(prompt, SamplingParams(**values), heard.emit, follow_up=follow_up)  # type: ignore[arg-type]


@pytest.fixture
def model(tiny_model_config: ModelConfig) -> Scripted:
    torch.manual_seed(0)
    return Scripted(tiny_model_config).eval().requires_grad_(False)  # type: ignore[return-value]


Start = Callable[..., Engine]


@pytest.fixture
def start(model: Scripted, tiny_codec: Codec) -> Iterator[Start]:
    engines = []

    def start(codec: Codec = tiny_codec, **config: object) -> Engine:
        engines.append(Engine(model, codec, EngineConfig(**config)))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.001)


def test_chunks_grow_and_decode_to_the_whole(start: Start, tiny_codec: Codec) -> None:
    heard = Heard()
    start(chunk_schedule=(1, 2, 4)).submit(wish(10, heard, max_frames=13))
    assert heard.last() == End("length")
    assert [len(chunk.codes) for chunk in heard.chunks] == [1, 2, 4, 4, 2]
    assert heard.codes == [[1 + n, 10] for n in range(13)]
    sound = torch.cat([chunk.pcm for chunk in heard.chunks])
    torch.testing.assert_close(sound, tiny_codec.decode(torch.tensor(heard.codes)), rtol=0, atol=1e-5)
    assert sound.dtype == torch.float32


def test_the_end_frame_is_no_sound(start: Start, model: Scripted) -> None:
    model.script = lambda who, frame: (0, 0) if frame == 6 else (5 + frame, who)
    heard = Heard()
    start().submit(wish(10, heard, max_frames=100))
    assert heard.last() == End("eos")
    assert heard.codes == [[5 + n, 10] for n in range(6)]


def test_a_stuck_model_is_stopped(start: Start, model: Scripted) -> None:
    model.script = lambda who, frame: (min(frame, 3) + 1, who)
    heard = Heard()
    start(repeat_limit=6, chunk_schedule=(100,)).submit(wish(10, heard, max_frames=100))
    assert heard.last() == End("silence")
    assert heard.codes == [[1, 10], [2, 10], [3, 10], [4, 10]]


def test_cancel_is_honoured_within_a_frame(start: Start, model: Scripted) -> None:
    heard = Heard()
    request = wish(10, heard, max_frames=400)

    def script(who: int, frame: int) -> tuple[int, int]:
        request.cancelled = frame >= 7
        return 1 + frame % 60, who

    model.script = script
    start().submit(request)
    assert heard.last() == End("cancelled")
    assert model.made[10] == 8


def test_deadline_is_honoured_within_a_frame(start: Start, model: Scripted) -> None:
    heard = Heard()
    request = wish(10, heard, max_frames=400)

    def script(who: int, frame: int) -> tuple[int, int]:
        request.deadline = time.monotonic() + (PATIENCE if frame < 5 else 0.0)
        return 1 + frame % 60, who

    model.script = script
    start().submit(request)
    assert heard.last() == End("timeout")
    assert model.made[10] == 6


def test_waiting_requests_can_be_cancelled_or_too_late(start: Start, model: Scripted) -> None:
    gate = threading.Event()
    model.script = lambda who, frame: (1 + frame % 60 if gate.wait(PATIENCE) else 0, who)
    ears = [Heard() for _ in range(4)]
    requests = [wish(10 + n, heard) for n, heard in enumerate(ears)]
    engine = start()
    for request in requests:
        engine.submit(request)
    requests[1].cancelled = True
    requests[2].deadline = time.monotonic()
    gate.set()
    ends = [heard.last() for heard in ears]
    assert ends == [End("length"), End("cancelled"), End("timeout"), End("length")]
    assert not ears[1].chunks
    assert not ears[2].chunks


def test_callers_take_turns_on_one_slot(start: Start) -> None:
    ears = [Heard() for _ in range(5)]
    engine = start()
    for n, heard in enumerate(ears):
        engine.submit(wish(10 + n, heard))
    for n, heard in enumerate(ears):
        assert heard.last() == End("length")
        assert heard.codes == [[1 + f, 10 + n] for f in range(10)]


def test_several_slots_run_at_once_and_keep_apart(start: Start, model: Scripted, tiny_codec: Codec) -> None:
    model.script = lambda who, frame: (1 + (frame * who) % 60, who)
    ears = [Heard() for _ in range(5)]
    engine = start(slots=3)
    for n, heard in enumerate(ears):
        engine.submit(wish(10 + n, heard, length=2 + n, max_frames=6 + 3 * n))
    for n, heard in enumerate(ears):
        assert heard.last() == End("length")
        assert heard.codes == [[1 + (f * (10 + n)) % 60, 10 + n] for f in range(6 + 3 * n)]
        sound = torch.cat([chunk.pcm for chunk in heard.chunks])
        torch.testing.assert_close(sound, tiny_codec.decode(torch.tensor(heard.codes)), rtol=0, atol=1e-5)


def test_a_full_queue_refuses_newcomers_but_no_follow_up(start: Start, model: Scripted) -> None:
    gate = threading.Event()
    model.script = lambda who, frame: (1 + frame if gate.wait(PATIENCE) else 0, who)
    engine = start(queue_size=1)
    ears = [Heard() for _ in range(4)]
    engine.submit(wish(10, ears[0]))
    until(lambda: 10 in model.made)
    engine.submit(wish(11, ears[1]))
    with pytest.raises(EngineBusyError, match="try again"):
        engine.submit(wish(12, ears[2]))
    engine.submit(wish(13, ears[3], follow_up=True))
    gate.set()
    assert [ears[n].last() for n in (0, 1, 3)] == [End("length")] * 3
    assert list(model.made) == [10, 13, 11]
    assert ears[2].events == []


@pytest.mark.parametrize("stage", ["prefill", "step", "decode"])
def test_an_error_ends_its_own_request_and_the_engine_goes_on(
    start: Start, model: Scripted, tiny_codec_state: dict[str, torch.Tensor], tiny_codec: Codec, stage: str
) -> None:
    broken = threading.Event()

    def fail(frames: object = None) -> None:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("injected: secret detail")

    codec = Codec(tiny_codec.config, tiny_codec_state)
    if stage == "prefill":
        model.on_prefill = fail
    elif stage == "step":
        model.script = lambda who, frame: (1 + frame, who) if frame != 3 or fail() is None else (0, 0)
    else:
        codec._decoder.decoder.register_forward_pre_hook(lambda module, args: fail())
    engine = start(codec=codec)
    first, second = Heard(), Heard()
    engine.submit(wish(10, first))
    engine.submit(wish(11, second))
    failure = first.last()
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, EngineError)
    assert "secret" not in str(failure.error)
    assert isinstance(failure.error.__cause__, RuntimeError)
    assert second.last() == End("length")
    assert second.codes == [[1 + f, 11] for f in range(10)]
    torch.testing.assert_close(
        torch.cat([chunk.pcm for chunk in second.chunks]),
        tiny_codec.decode(torch.tensor(second.codes)),
        rtol=0,
        atol=1e-5,
    )


def test_numbers_that_overflow_fail_only_their_row(start: Start, model: Scripted) -> None:
    model.text_embedding.weight[20] = float("nan")
    engine = start(slots=2)
    bad, good = Heard(), Heard()
    engine.submit(wish(20, bad))
    engine.submit(wish(21, good))
    failure = bad.last()
    assert isinstance(failure, Failure)
    assert "overflowed" in str(failure.error)
    assert not bad.chunks
    assert good.last() == End("length")


def test_an_emit_that_raises_harms_nobody(start: Start) -> None:
    calls = []

    def emit(event: Event) -> None:
        calls.append(event)
        raise ValueError("a careless caller")

    engine = start(slots=2)
    careless = wish(10, Heard())
    careless.emit = emit
    heard = Heard()
    engine.submit(careless)
    engine.submit(wish(11, heard))
    assert heard.last() == End("length")
    until(lambda: End("length") in calls)
    assert engine.alive


def test_close_ends_everything_once(start: Start, model: Scripted) -> None:
    engine = start()
    ears = [Heard() for _ in range(3)]
    for n, heard in enumerate(ears):
        engine.submit(wish(10 + n, heard, max_frames=400))
    until(lambda: bool(ears[0].chunks))
    engine.close()
    for heard in ears:
        failure = heard.last()
        assert isinstance(failure, Failure)
        assert "closed" in str(failure.error)
        assert sum(isinstance(event, End | Failure) for event in heard.events) == 1
    assert not engine.alive
    with pytest.raises(EngineError, match="closed"):
        engine.submit(wish(10, Heard()))
    engine.close()


def test_close_may_come_from_an_emit(start: Start) -> None:
    engine = start()
    heard = Heard()
    request = wish(10, heard, max_frames=400)

    def emit(event: Event) -> None:
        heard.emit(event)
        engine.close()

    request.emit = emit
    engine.submit(request)
    assert isinstance(heard.last(), Failure)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_dies_leaves_nobody_waiting(start: Start) -> None:
    engine = start()
    heard = Heard()

    def die() -> None:
        raise SystemError("a fault outside every stage")

    engine._sweep = die  # type: ignore[method-assign]
    engine.submit(wish(10, heard))
    failure = heard.last()
    assert isinstance(failure, Failure)
    assert "broke down" in str(failure.error)
    until(lambda: not engine.alive)


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), {}),
        (torch.zeros(0, 3, dtype=torch.int64), {}),
        (torch.zeros(3, 3), {}),
        (torch.zeros(3, dtype=torch.int64), {}),
        (torch.zeros(3, 3, dtype=torch.int64), {"max_frames": 0}),
        (torch.zeros(3, 3, dtype=torch.int64), {"top_k": 0}),
        (torch.zeros(3, 3, dtype=torch.int64), {"temperature": float("nan")}),
    ],
)
def test_what_is_no_request(start: Start, prompt: torch.Tensor, params: dict[str, float]) -> None:
    heard = Heard()
    with pytest.raises(InvalidInputError):
        start().submit(Request(prompt, SamplingParams(**params), heard.emit))  # type: ignore[arg-type]
    assert heard.events == []


def test_a_prompt_longer_than_the_window(start: Start) -> None:
    heard = Heard()
    with pytest.raises(PromptTooLongError) as caught:
        start().submit(wish(10, heard, length=515))
    assert caught.value.excess == 3
    start().submit(wish(10, heard, length=512))
    assert heard.last() == End("length")
    assert len(heard.codes) == 1


def test_model_and_codec_must_agree(tiny_codec: Codec, tiny_model_config: ModelConfig) -> None:
    values = tiny_model_config.to_dict()
    with pytest.raises(CsmError, match="codebooks"):
        Engine(CSM(ModelConfig.from_dict({**values, "num_codebooks": 3})), tiny_codec)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_request_ends_exactly_once(model: Scripted, tiny_codec: Codec, data: st.DataObject) -> None:
    """Random arrivals, lengths, cancels, deadlines and faults on two slots."""
    count = data.draw(st.integers(1, 8))
    fates = [data.draw(st.sampled_from(["eos", "length", "cancel", "late", "fault"])) for _ in range(count)]
    frames = [data.draw(st.integers(1, 9)) for _ in range(count)]
    ears = [Heard() for _ in range(count)]
    requests = [wish(10 + n, heard, max_frames=frames[n] + (fates[n] == "eos")) for n, heard in enumerate(ears)]

    def script(who: int, frame: int) -> tuple[int, int]:
        n, now = who - 10, frame == frames[who - 10] - 1
        if fates[n] == "fault" and now:
            raise RuntimeError("injected")
        requests[n].cancelled = fates[n] == "cancel" and now
        requests[n].deadline = 0.0 if fates[n] == "late" and now else None
        return (0, 0) if fates[n] == "eos" and frame == frames[n] else (1 + frame, who)

    model.script = script
    engine = Engine(model, tiny_codec, EngineConfig(slots=2))
    try:
        for request in requests:
            engine.submit(request)
            if data.draw(st.booleans()):
                time.sleep(0.002)
        for n, heard in enumerate(ears):
            end = heard.last()
            if isinstance(end, Failure):  # by its own fault or by that of a neighbour in the same step
                assert "fault" in fates
            else:
                expected = {"eos": "eos", "length": "length", "cancel": "cancelled", "late": "timeout"}[fates[n]]
                assert end.reason in {expected, "length"}
                assert heard.codes == [[1 + f, 10 + n] for f in range(len(heard.codes))]
        assert engine._scheduler.idle
    finally:
        engine.close()
    for heard in ears:
        assert sum(isinstance(event, End | Failure) for event in heard.events) == 1
        assert isinstance(heard.events[-1], End | Failure)
