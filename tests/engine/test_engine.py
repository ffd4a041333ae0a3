"""The thread and its loop: every accepted request ends exactly once, whatever happens to it or to its neighbours."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import torch

from csm_core.codec import Codec
from csm_core.config import EngineConfig, ModelConfig
from csm_core.engine import engine as engine_module
from csm_core.engine.engine import Engine, runs_short
from csm_core.engine.request import Chunk, End, Event, Failure, Request, SamplingParams
from csm_core.engine.runner import BROKEN, Runner
from csm_core.engine.scheduler import Frame
from csm_core.errors import CsmError, EngineBusyError, EngineError, InvalidInputError, PromptTooLongError
from csm_core.model.csm import ABSENT, CSM

PATIENCE = 60.0  # seconds until a test gives up; nothing here takes one


class Script:
    """What the test has to say: the codes of ``who`` in a frame, and something to do at each call of a stage.

    ``who`` is the text token of the prompt's last frame, 10 and up. ``calls`` are those that were made: the stage and
    its slots, ``made`` the frames that were launched.
    """

    def __init__(self) -> None:
        self.frame: Callable[[int, int], tuple[int, int]] = lambda who, frame: (1 + frame % 60, who)
        self.on: Callable[[str], None] = lambda stage: None
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.made: Counter[int] = Counter()

    def call(self, stage: str, *slots: int) -> None:
        self.calls.append((stage, slots))
        self.on(stage)

    def stages(self) -> list[str]:
        return [stage for stage, _ in self.calls]


class ScriptedStep:
    def __init__(self, script: Script, frames: list[Frame]) -> None:
        self._script, self._frames = script, frames

    def frames(self) -> list[Frame]:
        self._script.call("frames")
        return self._frames


class Scripted(Runner):
    """The real runner up to the codes that it reports. A frame that broke stays broken."""

    def __init__(self, script: Script, *args: Any) -> None:
        super().__init__(*args)
        self.script = script
        self.who: dict[int, int] = {}

    def begin(self, slot: int, request: Request) -> None:
        self.script.call("begin", slot)
        self.who[slot] = int(request.prompt[-1, -1])
        super().begin(slot, request)

    def prefill(self, slot: int, *args: Any) -> None:
        self.script.call("prefill", slot)
        super().prefill(slot, *args)

    def ready(self, slot: int, prompt: torch.Tensor) -> None:
        self.script.call("ready", slot)
        super().ready(slot, prompt)

    def save_prefix(self, slot: int, *args: Any) -> Any:
        self.script.call("save_prefix", slot)
        return super().save_prefix(slot, *args)

    def load_prefix(self, slot: int, *args: Any) -> None:
        self.script.call("load_prefix", slot)
        super().load_prefix(slot, *args)

    def move(self, source: int, target: int) -> None:
        self.script.call("move", source, target)
        self.who[target] = self.who.pop(source)
        super().move(source, target)

    def step(self, slots: Sequence[int]) -> ScriptedStep:  # type: ignore[override]
        self.script.call("step", *slots)
        frames: list[Frame] = []
        for slot, real in zip(slots, super().step(slots).frames(), strict=True):
            who = self.who[slot]
            number, self.script.made[who] = self.script.made[who], self.script.made[who] + 1
            frames.append(real if BROKEN in real else self.script.frame(who, number))
        return ScriptedStep(self.script, frames)

    def decode(self, chunks: Any) -> Any:
        self.script.call("decode", *chunks)
        return super().decode(chunks)


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


Start = Callable[..., Engine]


def speech(who: int, codes: list[list[int]], text: int = 2) -> torch.Tensor:
    """A prompt of one segment with these codes, then ``text`` frames of text, of which the last says ``who``."""
    frames = [[ABSENT, ABSENT, 3], *([*row, ABSENT] for row in codes), [0, 0, ABSENT]]
    return torch.tensor([*frames, *[[ABSENT, ABSENT, who]] * text])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(engine_module, "Runner", lambda *args: Scripted(script, *args))
    return script


@pytest.fixture
def start(script: Script, tiny_model: CSM, tiny_codec: Codec) -> Iterator[Start]:  # scripted, in every test here
    engines = []

    def start(codec: Codec = tiny_codec, model: CSM = tiny_model, **config: Any) -> Engine:
        engines.append(Engine(model, codec, EngineConfig(**config)))
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


def test_the_end_frame_is_no_sound(start: Start, script: Script) -> None:
    script.frame = lambda who, frame: (0, 0) if frame == 6 else (5 + frame, who)
    heard = Heard()
    start().submit(wish(10, heard, max_frames=100))
    assert heard.last() == End("eos")
    assert heard.codes == [[5 + n, 10] for n in range(6)]


def test_a_stuck_model_is_stopped(start: Start, script: Script) -> None:
    script.frame = lambda who, frame: (min(frame, 3) + 1, who)
    heard = Heard()
    start(repeat_limit=6, chunk_schedule=(100,)).submit(wish(10, heard, max_frames=100))
    assert heard.last() == End("silence")
    assert heard.codes == [[1, 10], [2, 10], [3, 10], [4, 10]]


def test_cancel_is_honoured_within_a_frame(start: Start, script: Script) -> None:
    heard = Heard()
    request = wish(10, heard, max_frames=400)

    def frame_of(who: int, frame: int) -> tuple[int, int]:
        request.cancelled = frame >= 7
        return 1 + frame % 60, who

    script.frame = frame_of
    start().submit(request)
    assert heard.last() == End("cancelled")
    assert script.made[10] == 8


def test_deadline_is_honoured_within_a_frame(start: Start, script: Script) -> None:
    heard = Heard()
    request = wish(10, heard, max_frames=400)

    def frame_of(who: int, frame: int) -> tuple[int, int]:
        request.deadline = time.monotonic() + (PATIENCE if frame < 5 else 0.0)
        return 1 + frame % 60, who

    script.frame = frame_of
    start().submit(request)
    assert heard.last() == End("timeout")
    assert script.made[10] == 6


def test_waiting_requests_can_be_cancelled_or_too_late(start: Start, script: Script) -> None:
    gate = threading.Event()
    script.frame = lambda who, frame: (1 + frame % 60 if gate.wait(PATIENCE) else 0, who)
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


def test_several_slots_run_at_once_and_keep_apart(start: Start, script: Script, tiny_codec: Codec) -> None:
    script.frame = lambda who, frame: (1 + (frame * who) % 60, who)
    ears = [Heard() for _ in range(5)]
    engine = start(slots=3)
    for n, heard in enumerate(ears):
        engine.submit(wish(10 + n, heard, length=2 + n, max_frames=6 + 3 * n))
    for n, heard in enumerate(ears):
        assert heard.last() == End("length")
        assert heard.codes == [[1 + (f * (10 + n)) % 60, 10 + n] for f in range(6 + 3 * n)]
        sound = torch.cat([chunk.pcm for chunk in heard.chunks])
        torch.testing.assert_close(sound, tiny_codec.decode(torch.tensor(heard.codes)), rtol=0, atol=1e-5)


def test_a_full_queue_refuses_newcomers_but_no_follow_up(start: Start, script: Script) -> None:
    gate = threading.Event()
    script.frame = lambda who, frame: (1 + frame if gate.wait(PATIENCE) else 0, who)
    engine = start(queue_size=1)
    ears = [Heard() for _ in range(4)]
    engine.submit(wish(10, ears[0]))
    until(lambda: 10 in script.made)
    engine.submit(wish(11, ears[1]))
    with pytest.raises(EngineBusyError, match="try again"):
        engine.submit(wish(12, ears[2]))
    engine.submit(wish(13, ears[3], follow_up=True))
    gate.set()
    assert [ears[n].last() for n in (0, 1, 3)] == [End("length")] * 3
    assert list(script.made) == [10, 13, 11]
    assert ears[2].events == []


STAGES = ["begin", "load_prefix", "prefill", "ready", "step", "frames", "decode"]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("stage", STAGES)
def test_an_error_ends_its_own_request_and_the_engine_goes_on(
    start: Start, script: Script, tiny_codec: Codec, stage: str, error: type[Exception]
) -> None:
    engine = start()
    prompt = speech(11, [[5, 6], [7, 8]])
    before, first, second = Heard(), Heard(), Heard()
    engine.submit(Request(prompt, SamplingParams(max_frames=1), before.emit))
    assert before.last() == End("length")
    assert engine.prefix_bytes > 0

    def fail(now: str) -> None:
        if now == stage:
            script.on = lambda stage: None
            raise error("injected: secret detail")

    script.on, script.made = fail, Counter()
    engine.submit(Request(prompt, SamplingParams(max_frames=10), first.emit))
    failure = first.last()
    engine.submit(Request(prompt, SamplingParams(max_frames=10), second.emit))
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, EngineError)
    assert "secret" not in str(failure.error)
    assert isinstance(failure.error.__cause__, error)
    assert failure.error.__cause__.__traceback__ is None  # its frames would keep their tensors
    assert second.last() == End("length")
    sound = torch.cat([chunk.pcm for chunk in second.chunks])
    torch.testing.assert_close(sound, tiny_codec.decode(torch.tensor(second.codes)), rtol=0, atol=1e-5)
    hits = 1 + (stage not in {"begin", "load_prefix"})
    assert engine.counts.hits == hits - (error is torch.OutOfMemoryError)  # what the prefix cache held was let go


def test_no_memory_for_a_copy_is_no_failure(start: Start, script: Script) -> None:
    def fail(stage: str) -> None:
        if stage == "save_prefix":
            raise torch.OutOfMemoryError("injected")

    script.on = fail
    engine = start()
    for _ in range(2):
        heard = Heard()
        engine.submit(Request(speech(11, [[5, 6]]), SamplingParams(max_frames=2), heard.emit))
        assert heard.last() == End("length")
    assert script.stages().count("save_prefix") == 2
    assert engine.prefix_bytes == 0


def test_numbers_that_overflow_fail_only_their_row(start: Start, tiny_model_config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = CSM(tiny_model_config).eval().requires_grad_(False)
    model.text_embedding.weight[20] = float("nan")
    engine = start(model=model, slots=2)
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


def test_close_ends_everything_once(start: Start, script: Script) -> None:
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


def test_a_long_prompt_is_read_between_the_frames_of_those_who_speak(start: Start, script: Script) -> None:
    engine = start(slots=2, prefill_piece=16)
    speaker, newcomer = Heard(), Heard()
    first = wish(10, speaker, max_frames=40)

    def come(stage: str) -> None:
        if script.made[10] == 3 and stage == "step":
            engine.submit(wish(11, newcomer, length=200))

    script.on = come
    engine.submit(first)
    assert speaker.last() == newcomer.last() == End("length")
    assert script.calls.count(("prefill", (1,))) == 13
    runs = [
        (stage, len(list(calls))) for stage, calls in groupby(s for s in script.stages() if s in {"prefill", "step"})
    ]
    assert [count for stage, count in runs[1:] if stage == "prefill"] == [1] * 13
    assert newcomer.codes == [[1 + n, 11] for n in range(10)]


@pytest.mark.parametrize(("fate", "reason"), [("cancelled", "cancelled"), ("deadline", "timeout")])
def test_a_prompt_that_nobody_wants_is_not_read_on(start: Start, script: Script, fate: str, reason: str) -> None:
    heard, after = Heard(), Heard()
    request = wish(10, heard, length=300)

    def give_up(stage: str) -> None:
        if script.stages().count("prefill") == 3:
            setattr(request, fate, True if fate == "cancelled" else 0.0)

    script.on = give_up
    engine = start(prefill_piece=16)
    engine.submit(request)
    engine.submit(wish(11, after))
    assert heard.last() == End(reason)  # type: ignore[arg-type]
    assert heard.events == [End(reason)]  # type: ignore[arg-type]
    assert after.last() == End("length")
    assert script.stages().count("prefill") == 4  # three of it, one of the other


def test_a_known_voice_is_not_read_again(start: Start, script: Script) -> None:
    """A reference of 20 s: 250 frames, and its text."""
    codes = torch.randint(1, 60, (250, 2), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [speech(who, codes, text=2 + who % 3) for who in (11, 12, 13)]
    caches, heard = [], []
    for budget in (0, 2**20):
        engine = start(prefix_cache_bytes=budget, prefill_piece=64)
        script.made.clear()
        for prompt in prompts:
            ear = Heard()
            engine.submit(Request(prompt, SamplingParams(max_frames=1), ear.emit))
            assert ear.last() == End("length")
            cache = engine._runner._cache
            caches.append(torch.stack((cache.keys, cache.values))[..., : len(prompt), :].clone())
            heard.append(ear.codes)
        if not budget:
            assert (engine.counts.hits, engine.counts.skipped, engine.prefix_bytes) == (0, 0, 0)
    context = 252
    assert engine.counts.hits == 2
    assert engine.counts.skipped >= 2 * 0.95 * context
    assert engine.counts.skipped + engine.counts.read == sum(len(prompt) - 1 for prompt in prompts)
    assert 0 < engine.prefix_bytes <= 2**20
    for off, on in zip(caches[:3], caches[3:], strict=True):
        assert torch.equal(off, on)  # bit for bit
    assert heard[:3] == heard[3:]


def test_of_many_with_a_new_voice_one_reads_it(start: Start, script: Script) -> None:
    engine = start(slots=4)
    ears = [Heard() for _ in range(8)]
    with engine._changed:  # all at once
        for n, ear in enumerate(ears):
            engine.submit(Request(speech(10 + n, [[5, 6], [7, 8]]), SamplingParams(max_frames=5), ear.emit))
    for n, ear in enumerate(ears):
        assert ear.last() == End("length")
        assert ear.codes == [[1 + f, 10 + n] for f in range(5)]
    assert engine.counts.hits == 7


def test_looking_ahead_launches_before_it_reads_and_says_the_same(start: Start, script: Script) -> None:
    script.frame = lambda who, frame: (0, 0) if frame == 6 else (5 + frame, who)
    heard, logs = [], []
    for lookahead in (0, 1):
        engine = start(slots=2, lookahead=lookahead)
        script.calls.clear()
        for params in ({"max_frames": 100}, {"max_frames": 4}):
            script.made.clear()
            ear = Heard()
            engine.submit(wish(10, ear, **params))
            heard.append((ear.last(), ear.codes))
        until(lambda: engine._ahead is None)  # noqa: B023
        logs.append([stage for stage in script.stages() if stage in {"step", "frames"}])
    assert heard[:2] == heard[2:]
    assert [end for end, _ in heard[:2]] == [End("eos"), End("length")]
    assert logs[0] == ["step", "frames"] * 11
    end_comes_late = [
        "step",
        *["step", "frames"] * 7,
    ]  # the eighth is launched before the seventh is known to be the end
    assert logs[1] == [*end_comes_late, *["step", *["step", "frames"] * 3, "frames"]]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_last_position_is_not_passed(start: Start, lookahead: int) -> None:
    heard = Heard()
    start(lookahead=lookahead).submit(wish(10, heard, length=509, max_frames=50))
    assert heard.last() == End("length")
    assert len(heard.codes) == 4


@pytest.mark.parametrize("lookahead", [0, 1])
def test_who_is_left_moves_down_and_goes_on(start: Start, script: Script, tiny_codec: Codec, lookahead: int) -> None:
    engine = start(slots=4, lookahead=lookahead)
    ears = [Heard() for _ in range(4)]
    with engine._changed:
        for n, ear in enumerate(ears):
            engine.submit(wish(10 + n, ear, length=2 + n, max_frames=[6, 30, 12, 24][n]))
    for n, ear in enumerate(ears):
        assert ear.last() == End("length")
        assert ear.codes == [[1 + f % 60, 10 + n] for f in range([6, 30, 12, 24][n])]
        sound = torch.cat([chunk.pcm for chunk in ear.chunks])
        torch.testing.assert_close(sound, tiny_codec.decode(torch.tensor(ear.codes)), rtol=0, atol=1e-5)
    assert [slots for stage, slots in script.calls if stage == "move"] == [(3, 0), (1, 0)]
    assert [slots for stage, slots in script.calls if stage == "step"][-1] == (0,)


def test_what_waits_and_what_runs_can_be_read(start: Start, script: Script) -> None:
    gate = threading.Event()
    script.frame = lambda who, frame: (1 + frame if gate.wait(PATIENCE) else 0, who)
    engine = start(slots=2)
    ears = [Heard() for _ in range(5)]
    for n, ear in enumerate(ears):
        engine.submit(wish(10 + n, ear))
    until(lambda: engine.running > 0)
    assert engine.running + engine.waiting == 5
    gate.set()
    for ear in ears:
        ear.last()
    assert (engine.running, engine.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("free", "unused", "short"), [(50, 500, False), (49, 500, True), (0, 10, True), (0, 9, False), (0, 0, False)]
)
def test_when_a_device_runs_short(free: int, unused: int, short: bool) -> None:
    assert runs_short(free, unused, total=1000) is short


@pytest.mark.gpu
def test_memory_that_runs_out_on_a_device(
    start: Start, script: Script, tiny_model: CSM, tiny_codec_state: dict[str, torch.Tensor], tiny_codec: Codec
) -> None:
    model = CSM(tiny_model.config).cuda().eval().requires_grad_(False)
    engine = start(codec=Codec(tiny_codec.config, tiny_codec_state, "cuda"), model=model, slots=2)

    def exhaust(stage: str) -> None:
        if stage == "step":
            script.on = lambda stage: None
            torch.empty(2**50, device="cuda")

    script.on = exhaust
    first, second = Heard(), Heard()
    engine.submit(wish(10, first))
    failure = first.last()
    assert isinstance(failure, Failure)
    assert isinstance(failure.error.__cause__, torch.OutOfMemoryError)
    engine.submit(wish(11, second))
    assert second.last() == End("length")
