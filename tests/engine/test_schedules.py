"""Random schedules: requests come, give up, run late and meet faults at every stage, in 1,000 seeded ways.

Whatever happens, each ends once, no slot stays taken, nothing grows, and what is heard of a request is what it says
when it is alone. Run over a ledger in place of the tensors (which also refuses calls that break the runner's contract)
and over the real runner with a tiny model.
"""

import gc
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from csm_core.codec import Codec
from csm_core.config import EngineConfig
from csm_core.engine import engine as engine_module
from csm_core.engine.engine import Engine
from csm_core.engine.prefix_cache import find_marks
from csm_core.engine.request import Chunk, End, Event, Failure, FinishReason, Request, SamplingParams
from csm_core.engine.runner import BROKEN, Runner
from csm_core.engine.scheduler import Frame, Progress
from csm_core.errors import EngineBusyError
from csm_core.model.csm import ABSENT, CSM
from csm_core.model.kv_cache import Prefix

PATIENCE = 60.0  # seconds until a test gives up
STAGES = ["begin", "load_prefix", "prefill", "ready", "save_prefix", "move", "step", "frames", "decode"]
ERRORS = [RuntimeError, MemoryError, ValueError, torch.OutOfMemoryError]
CONFIGS: list[dict[str, Any]] = [
    {"slots": 1, "queue_size": 2},
    {"slots": 3, "lookahead": 1, "prefill_piece": 4, "chunk_schedule": (1, 5)},
    {"slots": 5, "prefill_piece": 7, "chunk_schedule": (1, 3), "prefix_cache_bytes": 1000},
    {"slots": 8, "batch_buckets": False, "prefix_cache_bytes": 0},
    {"slots": 8, "lookahead": 1, "prefill_piece": 9, "queue_size": 0, "repeat_limit": 2},
]

# With everything that can be switched off switched off. (Chunks of one frame: a model that breaks is heard until then.)
PLAIN = EngineConfig(chunk_schedule=(1,), batch_buckets=False, prefix_cache_bytes=0, lookahead=0)


class Made:
    """A launched step whose frames can be had."""

    def __init__(self, frames: Callable[[], list[Frame]]) -> None:
        self.frames = frames


@dataclass
class Account:
    """What a ledger knows of a slot: a number for everything read up to each position, and the frames made so far."""

    seed: int
    min_frames: int
    read: list[int] = field(default_factory=list)
    last: Frame | None = None  # what the next step reads
    made: int = 0
    decoded: int = 0


def follow(before: Sequence[int], frame: Sequence[int]) -> int:
    return hash((before[-1] if before else 0, *frame))


def speak(account: Account) -> Frame:
    """A frame that depends on all that was read, the seed and its number; now and then an end, a repeat, a break."""
    assert account.last is not None
    account.read.append(follow(account.read, account.last))
    number = hash((account.read[-1], account.seed, account.made))
    frame = (1 + number % 60, number // 60 % 60)
    if number % 13 == 0 and account.made >= account.min_frames:
        frame = (0, 0)
    elif number % 7 == 0 and account.made:
        frame = account.last[:2]
    if (account.last[0] == BROKEN and account.made) or number % 89 == 0:
        frame = (BROKEN, BROKEN)  # and so is all that follows
    account.last = (*frame, ABSENT)
    account.made += 1
    return frame


class Ledger:
    """A runner that keeps accounts in place of tensors and writes down what breaks the contract."""

    def __init__(self, model: CSM, codec: Codec, config: EngineConfig) -> None:
        self.model, self.window, self.config = model, 40, config  # little room after the longest prompts
        self.accounts: dict[int, Account] = {}
        self.complaints: list[str] = []
        self.pieces = 0  # read since the last step
        self.spoke: list[Account] = []  # in the last step

    def warm_up(self) -> None:
        pass

    def insist(self, kept: bool, rule: str) -> None:
        if not kept:
            self.complaints.append(rule)

    def begin(self, slot: int, request: Request) -> None:
        self.insist(0 <= slot < self.config.slots, "a slot that there is")
        self.accounts[slot] = Account(request.params.seed, request.params.min_frames)

    def load_prefix(self, slot: int, prefix: Prefix, length: int) -> None:
        self.insist(not self.accounts[slot].read, "a prefix comes first")
        self.accounts[slot].read = prefix.keys.flatten().tolist()[:length]

    def save_prefix(self, slot: int, length: int) -> Prefix:
        self.insist(0 < length <= len(self.accounts[slot].read), "only what was read can be saved")
        keys = torch.tensor(self.accounts[slot].read[:length]).view(1, 1, -1, 1)
        return Prefix(keys, keys)

    def prefill(self, slot: int, prompt: Tensor, start: int, stop: int) -> None:
        account, self.pieces = self.accounts[slot], self.pieces + 1
        self.insist(start == len(account.read) < stop < len(prompt), "pieces follow each other, up to the last frame")
        self.insist(stop - start <= self.config.prefill_piece, "pieces are bounded")
        self.insist(not any(start < mark.end < stop for mark in find_marks(prompt)), "a piece is of one segment")
        for frame in prompt[start:stop].tolist():
            account.read.append(follow(account.read, frame))

    def ready(self, slot: int, prompt: Tensor) -> None:
        account = self.accounts[slot]
        self.insist(len(account.read) == len(prompt) - 1 and account.last is None, "ready once, when all is read")
        account.last = tuple(prompt[-1].tolist())

    def step(self, slots: Sequence[int]) -> Made:
        self.insist(list(slots) == sorted(set(slots)) != [], "slots ascend")
        speakers = [self.accounts[slot] for slot in slots]
        self.insist(all(len(account.read) < self.window for account in speakers), "the window is not exceeded")
        waited = any(account is other for account in speakers for other in self.spoke)
        self.insist(self.pieces <= 1 or not waited, "speakers wait for one piece at most")
        self.pieces, self.spoke = 0, speakers
        frames = [speak(account) for account in speakers]
        return Made(lambda: frames)

    def move(self, source: int, target: int) -> None:
        self.insist(target < source, "requests move down")
        self.accounts[target] = self.accounts.pop(source)

    def decode(self, chunks: Mapping[int, Sequence[Frame]]) -> dict[int, Tensor]:
        """As sound: the number of each frame in its stream, then its codes."""
        sound = {}
        for slot, frames in chunks.items():
            first = self.accounts[slot].decoded
            sound[slot] = torch.tensor([[first + n, *frame] for n, frame in enumerate(frames)]).flatten().float()
            self.accounts[slot].decoded += len(frames)
        return sound


class Weather:
    """What goes on around the engine in one schedule, asked at each of its calls: all of it from one seed."""

    def __init__(self, rng: random.Random, submit: Callable[["Caller"], None]) -> None:
        self.now = 0
        self.faults = {
            (rng.choice(STAGES), rng.randrange(8), rng.random() < 0.5) for _ in range(rng.choice([0, 0, 1, 3]))
        }
        self.struck: list[str] = []
        self.seen: set[str] = set()
        self.arrivals: list[tuple[int, Caller]] = []
        self.callers: list[Caller] = []
        self._error = rng.choice(ERRORS)
        self._submit = submit
        self._calls: dict[tuple[str, bool], int] = {}

    def pass_by(self, stage: str, after: bool) -> None:
        """Time passes: somebody comes, somebody gives up, something breaks."""
        self.now += 1
        self.seen.add(stage)
        while self.arrivals and self.arrivals[0][0] <= self.now:
            self._submit(self.arrivals.pop(0)[1])
        for caller in self.callers:
            caller.lose_patience(self.now)
        count = self._calls.get((stage, after), 0)
        self._calls[stage, after] = count + 1
        if (stage, count, after) in self.faults:
            self.struck.append(stage)
            raise self._error(f"injected into {stage}")


def exposed(kind: type, weather: Callable[[], Weather]) -> type:
    """A kind of runner with weather before and after each stage."""

    def stage(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            weather().pass_by(name, after=False)
            result = getattr(kind, name)(self, *args)
            weather().pass_by(name, after=True)
            if name != "step":
                return result
            # An error that surfaces when the codes are read, as those of a device do.
            return Made(lambda: (weather().pass_by("frames", after=False), result.frames())[1])

        return call

    return type("Exposed", (kind,), {name: stage(name) for name in STAGES if name != "frames"})


class Caller:
    """A request with its fate, and what it heard. ``afterwards``: what any heard after its end."""

    afterwards: ClassVar[list[Event]] = []

    def __init__(self, rng: random.Random, prompt: Tensor, params: SamplingParams) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.refused = False
        self.fate = rng.choice(["patient"] * 4 + ["cancel", "late", "careless"])
        self.patience = rng.randrange(60)
        self.request = Request(prompt, params, self.hear, follow_up=rng.random() < 0.2)

    def lose_patience(self, now: int) -> None:
        if now >= self.patience:
            self.request.cancelled |= self.fate == "cancel"
            self.request.deadline = 0.0 if self.fate == "late" else None

    def hear(self, event: Event) -> None:
        self.afterwards += [event] if self.ended.is_set() else []
        self.events.append(event)
        if isinstance(event, End | Failure):
            self.ended.set()
        if self.fate == "careless":
            raise ValueError("an emit that breaks its contract")

    @property
    def chunks(self) -> list[Chunk]:
        return [event for event in self.events if isinstance(event, Chunk)]

    @property
    def codes(self) -> list[Frame]:
        return [tuple(frame) for chunk in self.chunks for frame in chunk.codes.tolist()]

    @property
    def sound(self) -> Tensor:
        return torch.cat([chunk.pcm for chunk in self.chunks] or [torch.zeros(0)])


@dataclass(frozen=True)
class Alone:
    """What a wish says when nobody else is there."""

    codes: list[Frame]
    sound: Tensor
    reason: FinishReason | None  # None: the model broke


Wish = tuple[Tensor, SamplingParams]

ALONE: dict[tuple[type, int], list[Alone]] = {}  # by kind of runner and repeat limit: what all configurations share


def make_wishes(rng: random.Random, count: int) -> list[Wish]:
    """Prompts of up to three segments, many of which begin alike, and a text."""

    def frames(rows: int, closed: bool) -> Tensor:
        text = [[ABSENT, ABSENT, rng.randrange(2, 64)] for _ in range(rng.randrange(1, 4))]
        sound = [[rng.randrange(1, 61), rng.randrange(61), ABSENT] for _ in range(rows)]
        return torch.tensor([*text, *sound, *([[0, 0, ABSENT]] if closed else [])])

    voices = [[frames(rng.randrange(1, 12), closed=True) for _ in range(3)] for _ in range(3)]
    wishes = []
    for _ in range(count):
        context = rng.choice(voices)[rng.choice([0, 0, 0, 1]) : rng.choice([0, 1, 1, 2, 3])]
        params = SamplingParams(
            rng.choice([0.0, 0.9]), rng.choice([5, 1000]), rng.getrandbits(63), rng.randrange(1, 14), rng.randrange(3)
        )
        wishes.append((torch.cat([*context, frames(0, closed=False)]), params))
    return wishes


def listen(engine: Engine, wishes: list[Wish]) -> list[Alone]:
    """Each wish by itself."""
    alone = []
    for wish in wishes:
        caller = Caller(random.Random(0), *wish)
        caller.fate = "patient"
        engine.submit(caller.request)
        assert caller.ended.wait(PATIENCE)
        end = caller.events[-1]
        alone.append(Alone(caller.codes, caller.sound, end.reason if isinstance(end, End) else None))
    return alone


class Stage:
    """An engine over one kind of runner, the wishes of its callers, and how each sounds alone."""

    def __init__(self, start: Callable[[type, EngineConfig], Engine], kind: type, config: EngineConfig) -> None:
        self.weather = Weather(random.Random(0), self.submit)
        self.config = config
        self.wishes = make_wishes(random.Random(1), 16)
        known = (kind, config.repeat_limit)
        if known not in ALONE:
            ALONE[known] = listen(start(kind, replace(PLAIN, repeat_limit=config.repeat_limit)), self.wishes)
        self.alone = ALONE[known]
        self.engine = start(exposed(kind, lambda: self.weather), config)

    def submit(self, caller: Caller) -> None:
        try:
            self.engine.submit(caller.request)
        except EngineBusyError:
            caller.refused = True
            caller.ended.set()

    def play(self, seed: int) -> None:
        """One schedule, and everything that must hold after it."""
        rng = random.Random(seed)
        self.weather = weather = Weather(rng, self.submit)
        chosen = [rng.randrange(len(self.wishes)) for _ in range(rng.randrange(1, 12))]
        expected = [self.alone[index] for index in chosen]
        weather.callers = [Caller(rng, *self.wishes[index]) for index in chosen]
        moments = sorted(rng.choice([0, rng.randrange(80)]) for _ in chosen)
        weather.arrivals = list(zip(moments, weather.callers, strict=True))
        while weather.arrivals:  # whoever did not come while somebody else was served comes now
            with self.engine._changed:  # the engine sees those who come together at once, so that a seed is a schedule
                moment = weather.arrivals[0][0]
                while weather.arrivals and weather.arrivals[0][0] == moment:
                    self.submit(weather.arrivals.pop(0)[1])
            self.settle(weather)
        for caller, alone in zip(weather.callers, expected, strict=True):
            check(caller, alone, weather, exact=not isinstance(self.engine._runner, Runner))
        assert getattr(self.engine._runner, "complaints", []) == []
        assert Caller.afterwards == []
        assert self.engine._prefixes.nbytes <= self.config.prefix_cache_bytes
        weather.callers = []

    def at_rest(self) -> bool:
        with self.engine._changed:  # who leaves the queue for a slot is in neither for a moment
            return self.engine._scheduler.idle and self.engine._ahead is None

    def settle(self, weather: Weather) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.at_rest():
            assert time.monotonic() < deadline, "a request does not end, or its slot stays taken"
            time.sleep(0.0002)
        coming = {id(caller) for _, caller in weather.arrivals}
        for caller in weather.callers:  # a slot is free before its request hears so
            assert id(caller) in coming or caller.ended.wait(PATIENCE), "a request does not end"
        assert self.engine.alive
        assert self.engine.running == self.engine.waiting == 0


def check(caller: Caller, alone: Alone, weather: Weather, exact: bool) -> None:
    ends = [event for event in caller.events if isinstance(event, End | Failure)]
    assert len(ends) == (not caller.refused)
    assert caller.events[-1:] == ends
    codes, sound = caller.codes, caller.sound
    assert codes == alone.codes[: len(codes)]
    tolerance = 0.0 if exact else 1e-5
    torch.testing.assert_close(sound, alone.sound[: len(sound)], rtol=0, atol=tolerance)
    if not ends:
        assert weather.callers  # refused
    elif isinstance(ends[0], Failure):
        assert weather.struck or alone.reason is None
    elif ends[0].reason in {"cancelled", "timeout"}:
        assert caller.fate == {"cancelled": "cancel", "timeout": "late"}[ends[0].reason]
    else:
        assert (codes, ends[0].reason) == (alone.codes, alone.reason)
        assert len(sound) == len(alone.sound)


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_model: CSM, tiny_codec: Codec
) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []
    caplog.set_level(logging.CRITICAL, engine_module.__name__)  # a record of an error would keep what it was raised in

    def start(kind: type, config: EngineConfig) -> Engine:
        monkeypatch.setattr(engine_module, "Runner", kind)
        engines.append(Engine(tiny_model, tiny_codec, config))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def living() -> tuple[int, int, int]:
    """How many objects of a request, tensors, and bytes in tensors there are."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), Tensor)]
    return (
        sum(type(o) in {Request, Progress, Caller, Chunk} for o in objects),
        len(tensors),
        sum(tensor.nbytes for tensor in tensors),
    )


def play_many(stage: Stage, schedules: int) -> None:
    """The first half is played twice: the second time, every shape has been seen and nothing may be added."""
    for seed in range(schedules):
        stage.play(seed)
    stage.engine._prefixes.clear()
    _, tensors, size = living()
    for seed in range(schedules // 2):
        stage.play(seed)
    stage.engine._prefixes.clear()
    deadline = time.monotonic() + PATIENCE
    while (left := living())[0] or left[1] > tensors or left[2] > size:  # the engine may still be in its last turn
        assert time.monotonic() < deadline, (
            f"of {tensors} tensors and {size} bytes became {left[1:]}, {left[0]} objects"
        )
        time.sleep(0.01)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_schedules_of_a_ledger(start: Callable[..., Engine], config: dict[str, Any]) -> None:
    play_many(Stage(start, Ledger, EngineConfig(**config)), 200)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_schedules_of_the_real_runner(start: Callable[..., Engine], config: dict[str, Any]) -> None:
    play_many(Stage(start, Runner, EngineConfig(**config)), 4)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_many_schedules_of_the_real_runner(start: Callable[..., Engine], config: dict[str, Any]) -> None:
    play_many(Stage(start, Runner, EngineConfig(**config)), 200)
