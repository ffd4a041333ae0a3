"""One sentence through the engine until it can be heard: takes, the silence policy applied to PCM, clean edges.

Knows no text, no voice and no format. A prompt goes in; PCM comes out while it is being made.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from csm_core.config import SilenceConfig
from csm_core.engine.engine import Engine
from csm_core.engine.request import Chunk, End, Event, Failure, FinishReason, Request, SamplingParams
from csm_core.errors import RequestCancelledError, RequestTimeoutError, SilentOutputError
from csm_core.silence import SilenceGate, Take, plan_take

FADE = 120  # samples, 5 ms: enough that an edge does not click, too short to be heard as a fade


@dataclass(frozen=True)
class Sentence:
    """What to speak, ready for the engine: ``prompt`` int64 [T, K+1], and how its first take is sampled."""

    prompt: Tensor
    first: Take
    max_frames: int


@dataclass(eq=False)
class Account:
    """What became of one speech so far. Written by the thread that listens; any thread may read it, or cancel."""

    seed: int
    started: float  # time.monotonic()
    deadline: float | None
    first_sound_seconds: float | None = None
    takes: list[Take] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)  # of each sentence, int64 [n, K]: the frames that are heard
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    request: Request | None = None  # the one that runs now

    @property
    def frames(self) -> int:
        return sum(len(codes) for codes in self.codes)

    def cancel(self) -> None:
        """End it within a frame; who listens gets RequestCancelledError."""
        self.cancelled = True
        if self.request is not None:
            self.request.cancelled = True


@dataclass(frozen=True, eq=False)
class Speech:
    """A complete speech: ``audio`` float32 ``[samples]`` on the CPU, ``codes`` int64 ``[frames, K]`` without EOS.

    ``finish_reason``: "eos" if every sentence came to its end by itself. ``takes``: every attempt with what it was
    sampled with. The same ``seed`` with the same input gives the same speech.
    """

    audio: Tensor
    sample_rate: int
    codes: Tensor
    finish_reason: FinishReason
    takes: tuple[Take, ...]
    seed: int
    first_sound_seconds: float
    processing_time_seconds: float

    @property
    def duration_seconds(self) -> float:
        return self.audio.numel() / self.sample_rate

    @property
    def rtf(self) -> float:
        """Generation time per audio time: below 1 is faster than real time."""
        return self.processing_time_seconds / self.duration_seconds


class SpeechStream(Iterator[Tensor]):
    """Chunks of PCM float32 ``[samples]`` on the CPU, each as soon as it is made. Use it on one thread.

    ``close`` (also called by the end of a ``with`` block, or by forgetting the stream) stops the engine's work on it;
    ``cancel`` does so from any thread. ``seed`` is known at once, ``takes`` grow, ``finish_reason`` is None to the end.
    """

    def __init__(self, chunks: Generator[Tensor, None, None], account: Account) -> None:
        self._chunks = chunks
        self._account = account

    def __next__(self) -> Tensor:
        return next(self._chunks)

    @property
    def seed(self) -> int:
        return self._account.seed

    @property
    def takes(self) -> tuple[Take, ...]:
        return tuple(self._account.takes)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._account.finish_reason

    def cancel(self) -> None:
        """Stop within a frame, from any thread; a thread that waits for the next chunk gets RequestCancelledError."""
        self._account.cancel()

    def close(self) -> None:
        """Stop, from the thread that listens. After the end it does nothing."""
        self._account.cancel()
        self._chunks.close()

    def __enter__(self) -> "SpeechStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Listener:
    """Hears one take: lets pass what the silence policy allows, with the edges faded.

    ``verdict`` is None while the take may go on, then "retry" (nothing has passed or will) or why it is complete.
    """

    def __init__(self, config: SilenceConfig, sample_rate: int) -> None:
        self.verdict: FinishReason | Literal["retry"] | None = None
        self._gate = SilenceGate(config)
        self._window = config.window_ms * sample_rate // 1000  # samples
        self._held: list[Tensor] = []
        self._edge = torch.zeros(0)  # the last passed samples, kept back because they may turn out to be the end
        self._frames: list[Tensor] = []
        self._windows = 0  # heard in all
        self._passed: tuple[int, int] | None = None  # the first window that passed, and the one after the last
        self._windows_per_frame = 1

    def hear(self, chunk: Chunk) -> Tensor | None:
        """Take in the next chunk; returns what can be handed on now, if anything."""
        self._frames.append(chunk.codes)
        windows = chunk.pcm.view(-1, self._window)
        self._windows_per_frame = len(windows) // len(chunk.codes)
        passed: list[Tensor] = []
        for window, level in zip(windows, levels(windows), strict=True):
            passed += self._decide(window, level)
            if self.verdict is not None:
                break
        return self._but_edge(torch.cat([self._edge, *passed])) if passed else None

    def _decide(self, window: Tensor, level: float) -> list[Tensor]:
        """The windows that this one lets pass."""
        self._windows += 1
        self._held.append(window)
        decision = self._gate.hear(level)
        if decision.action == "hold":
            return []
        released, self._held = self._held[decision.drop :], []
        if decision.action != "pass":
            self.verdict = "retry" if decision.action == "retry" else "silence"
            return []
        first = self._windows - len(released) if self._passed is None else self._passed[0]
        if self._passed is None and first:  # cut out of the middle of a sound, where the codec did not start from zero
            released[0] = released[0] * _ramp(len(released[0]))
        self._passed = first, self._windows
        return released

    def end(self, reason: FinishReason) -> None:
        """The engine has no more of it."""
        self.verdict = "retry" if self._gate.silent else reason

    def last_sound(self) -> Tensor:
        """The kept-back edge, faded out: the last sound of a take that is complete."""
        return self._edge * _ramp(len(self._edge)).flip(0)

    def codes(self) -> Tensor:
        """Codes int64 ``[n, K]`` of the frames that are heard, wholly or in part."""
        first, after = self._passed or (0, 0)
        return torch.cat(self._frames)[first // self._windows_per_frame : -(-after // self._windows_per_frame)]

    def _but_edge(self, sound: Tensor) -> Tensor:
        self._edge = sound[-FADE:]
        return sound[:-FADE]


def levels(windows: Tensor) -> list[float]:
    """Level of each window of PCM ``[n, samples]`` in dBFS. Around its mean: a constant offset cannot be heard."""
    power = windows.var(dim=-1, correction=0)
    decibels: list[float] = (10 * power.clamp(min=1e-20).log10()).tolist()
    return decibels


def _ramp(length: int) -> Tensor:
    """From almost 0 up to 1 over FADE samples, then 1."""
    return (torch.arange(1, length + 1) / (FADE + 1)).clamp(max=1.0)


def speak_sentence(
    engine: Engine, config: SilenceConfig, sentence: Sentence, account: Account
) -> Generator[Tensor, None, FinishReason]:
    """Yield the PCM float32 of one sentence, from as many takes as it needs; return why it is complete.

    Only a take of which nothing was yielded is followed by another. Raises SilentOutputError after the last one,
    RequestTimeoutError, RequestCancelledError, and what the engine raises or fails with.
    """
    for number in range(config.max_takes):
        take = plan_take(sentence.first, number, config)
        listener = Listener(config, engine.sample_rate)
        yield from _one_take(engine, sentence, take, listener, account)
        if listener.verdict is not None and listener.verdict != "retry":
            account.codes.append(listener.codes())
            yield listener.last_sound()
            return listener.verdict
    raise SilentOutputError(
        f"Nothing could be heard in {config.max_takes} takes: try another seed, a clearer text, or a voice or context "
        "whose audio is loud and clean."
    )


def _one_take(engine: Engine, sentence: Sentence, take: Take, listener: Listener, account: Account) -> Iterator[Tensor]:
    events: SimpleQueue[Event] = SimpleQueue()
    request = Request(
        prompt=sentence.prompt,
        params=SamplingParams(take.temperature, take.top_k, take.seed, max_frames=sentence.max_frames),
        emit=events.put,
        deadline=account.deadline,
        follow_up=bool(account.takes),
    )
    account.request = request
    if account.cancelled:  # between two takes, when there was no request to tell
        request.cancelled = True
    engine.submit(request)
    account.takes.append(take)
    try:
        while listener.verdict is None:
            event = events.get()
            if account.cancelled:  # what was made before the engine noticed is not wanted either
                raise RequestCancelledError("The speech was cancelled.")
            if isinstance(event, Failure):
                raise event.error
            if isinstance(event, End):
                if event.reason == "timeout":
                    raise RequestTimeoutError("The time for this speech is over: allow more, or send a shorter text.")
                listener.end(event.reason)
            elif (sound := listener.hear(event)) is not None:
                if account.first_sound_seconds is None:
                    account.first_sound_seconds = time.monotonic() - account.started
                yield sound
    finally:
        request.cancelled = True
