"""Who waits, who holds which slot, and how far each has come. Pure Python: no tensors, no clock, no thread.

The engine asks it what to do next and tells it what happened; it calls nobody.
"""

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Literal

from csm_core.config import EngineConfig
from csm_core.engine.request import Request

Frame = tuple[int, ...]


@dataclass
class Progress:
    """The frames of one running request: when a chunk is due, and when and why it is done.

    ``pending`` are frames that were made and not yet decoded. An EOS frame never gets there; of frames that repeat
    until the limit, all but the first are taken back as far as they are still there.
    """

    request: Request
    chunk_schedule: Sequence[int]
    repeat_limit: int
    max_frames: int
    pending: list[Frame] = field(default_factory=list)
    frames: int = 0
    done: Literal["eos", "length", "silence"] | None = None
    _chunks: int = 0
    _last: Frame | None = None
    _repeats: int = 0  # how often in a row the last frame came again

    def add(self, frame: Frame) -> None:
        """Take in the frame that the step made."""
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
        return not (self.running or self.waiting)

    def add(self, request: Request) -> bool:
        """Queue a request; False, and nothing done, when the queue is full. A free slot counts as room."""
        if request.follow_up:
            self._follow_ups.append(request)
            return True
        room = self._config.queue_size + self._config.slots - len(self.running)
        if len(self.waiting) >= room:
            return False
        self._newcomers.append(request)
        return True

    def drop(self, doomed: Container[Request]) -> None:
        """Forget waiting requests."""
        self._follow_ups = deque(request for request in self._follow_ups if request not in doomed)
        self._newcomers = deque(request for request in self._newcomers if request not in doomed)

    def admit(self) -> tuple[int, Request] | None:
        """Give the next request the lowest free slot; None if there is no such pair."""
        slot = next((slot for slot in range(self._config.slots) if slot not in self.running), None)
        queue = self._follow_ups or self._newcomers
        if slot is None or not queue:
            return None
        request = queue.popleft()
        # The last frame is not fed back, so it needs no position of its own.
        room = self._window - len(request.prompt) + 1
        max_frames = min(request.params.max_frames, room)
        self.running[slot] = Progress(request, self._config.chunk_schedule, self._config.repeat_limit, max_frames)
        return slot, request

    def release(self, slot: int) -> Request:
        """Free a slot."""
        return self.running.pop(slot).request
