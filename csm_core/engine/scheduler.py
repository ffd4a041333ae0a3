"""Who waits, who holds which slot, and how far each has come. Pure Python: no tensors, no clock, no thread.

The engine asks it what to do next and tells it what happened; it calls nobody.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from csm_core.config import EngineConfig
from csm_core.engine.request import Request

Frame = tuple[int, ...]


class Mark(NamedTuple):
    """The ``end`` of a segment in a prompt: the position after it, and the digest of everything up to there."""

    end: int
    digest: bytes


@dataclass(eq=False)
class Progress:
    """One running request: what of its prompt is still to be read, the frames it got, when and why it is done.

    It reads until ``speaks``: the ``pieces`` that are left, (start, stop) positions, of a prompt with these ``marks``.
    ``launched`` counts the frames that were begun: none is begun that could not be used, however late the engine reads
    what it holds. ``pending`` are frames that were made and not yet decoded. An EOS frame never gets there; of frames
    that repeat until the limit, all but the first are taken back as far as they are still there.
    """

    request: Request
    slot: int
    max_frames: int
    chunk_schedule: Sequence[int]
    repeat_limit: int
    marks: Sequence[Mark] = ()
    pieces: deque[tuple[int, int]] = field(default_factory=deque)
    speaks: bool = False
    launched: int = 0
    pending: list[Frame] = field(default_factory=list)
    frames: int = 0
    done: Literal["eos", "length", "silence"] | None = None
    _chunks: int = 0
    _last: Frame | None = None
    _repeats: int = 0  # how often in a row the last frame came again

    def add(self, frame: Frame) -> None:
        """Take in the frame that a step made."""
        if not any(frame):
            self.done = "eos"
            return
        self._repeats = self._repeats + 1 if frame == self._last else 0
        self._last = frame
        self.frames += 1
        self.pending.append(frame)
        if self._repeats + 1 >= self.repeat_limit:
            del self.pending[-self._repeats :]
            self.done = "silence"
        elif self.frames >= self.max_frames:
            self.done = "length"

    def take_chunk(self) -> list[Frame]:
        """The frames to decode now: a chunk of the scheduled size, or all that is left when done, or none."""
        size = self.chunk_schedule[min(self._chunks, len(self.chunk_schedule) - 1)]
        if len(self.pending) < size and self.done is None:
            return []
        chunk, self.pending = self.pending, []
        self._chunks += 1
        return chunk


class Scheduler:
    """Waiting requests, and running ones by slot. Newcomers run in order of arrival, follow-ups before them.

    ``window`` are the model's positions: prompt and frames of a request share them.
    """

    def __init__(self, config: EngineConfig, window: int) -> None:
        self.running: dict[int, Progress] = {}
        self._config = config
        self._window = window
        self._follow_ups: deque[Request] = deque()
        self._newcomers: deque[Request] = deque()

    @property
    def waiting(self) -> list[Request]:
        """All that wait, in the order in which they would run."""
        return [*self._follow_ups, *self._newcomers]

    @property
    def idle(self) -> bool:
        return not (self.running or self._follow_ups or self._newcomers)

    def add(self, request: Request) -> bool:
        """Queue a request; False, and nothing done, when the queue is full. A free slot counts as room."""
        if request.follow_up:
            self._follow_ups.append(request)
            return True
        room = self._config.queue_size + self._config.slots - len(self.running)
        if len(self._follow_ups) + len(self._newcomers) >= room:
            return False
        self._newcomers.append(request)
        return True

    def drop(self, doomed: Container[Request]) -> None:
        """Forget waiting requests."""
        self._follow_ups = deque(request for request in self._follow_ups if request not in doomed)
        self._newcomers = deque(request for request in self._newcomers if request not in doomed)

    def admit(self) -> Progress | None:
        """Give the next request the lowest free slot; None if there is no such pair."""
        queue = self._follow_ups or self._newcomers
        slot = next((slot for slot in range(self._config.slots) if slot not in self.running), None)
        if slot is None or not queue:
            return None
        request = queue.popleft()
        # The last frame is not fed back, so it needs no position of its own.
        max_frames = min(request.params.max_frames, self._window - len(request.prompt) + 1)
        progress = Progress(request, slot, max_frames, self._config.chunk_schedule, self._config.repeat_limit)
        self.running[slot] = progress
        return progress

    def reader(self) -> Progress | None:
        """Whose prompt is being read."""
        return next((progress for progress in self.running.values() if not progress.speaks), None)

    def speakers(self) -> list[Progress]:
        """Who gets a frame in the next step, by slot."""
        by_slot = (self.running[slot] for slot in sorted(self.running))
        return [progress for progress in by_slot if progress.speaks and progress.launched < progress.max_frames]

    def runs(self, progress: Progress) -> bool:
        """Whether it still holds its slot."""
        return self.running.get(progress.slot) is progress

    def moves(self) -> list[tuple[int, int]]:
        """Which speakers should go on in which free slots: the fewest (source, target) that make steps smallest."""
        speaking = sorted((slot for slot, progress in self.running.items() if progress.speaks), reverse=True)
        if not self._config.batch_buckets or not speaking:
            return []
        free = [slot for slot in range(speaking[0]) if slot not in self.running]
        pairs = [(source, target) for source, target in zip(speaking, free, strict=False) if target < source]
        tops = [  # the highest slot that speaks after the first n moves
            max([*speaking[count:], *(target for _, target in pairs[:count])]) for count in range(len(pairs) + 1)
        ]
        sizes = [self._config.bucket(top + 1) for top in tops]
        return pairs[: sizes.index(min(sizes))]

    def move(self, source: int, target: int) -> None:
        """What ran in one slot runs in another, free one."""
        progress = self.running.pop(source)
        progress.slot = target
        self.running[target] = progress

    def release(self, progress: Progress) -> None:
        """Free its slot."""
        del self.running[progress.slot]


def cut(start: int, stop: int, marks: Sequence[Mark], longest: int) -> deque[tuple[int, int]]:
    """Cut positions ``start`` .. ``stop`` - 1 at the end of each segment and every ``longest`` positions after one.

    ``start`` is 0 or such an end: so a segment is always cut alike, whatever of the prompt was known before.
    """
    borders = [start, *(mark.end for mark in marks if start < mark.end < stop), stop]
    return deque(
        (position, min(position + longest, end))
        for begin, end in pairwise(borders)
        for position in range(begin, end, longest)
    )
