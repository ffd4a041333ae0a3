"""The engine: one thread and its loop over one model. Submit a request, hear its events, close.

Every request that was accepted ends exactly once, whatever happens. Knows no text, voice, retry, asyncio or HTTP.
"""

import atexit
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from csm_core.codec import Codec
from csm_core.config import EngineConfig
from csm_core.engine.request import Chunk, End, Event, Failure, FinishReason, Request
from csm_core.engine.runner import BROKEN, Runner
from csm_core.engine.scheduler import Scheduler
from csm_core.errors import CsmError, EngineBusyError, EngineError, InvalidInputError, PromptTooLongError
from csm_core.model.csm import CSM

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests of any number of threads on one of its own. Only that thread touches the runner or frees a slot."""

    def __init__(self, model: CSM, codec: Codec, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        if codec.num_codebooks != model.config.num_codebooks or codec.config.codebook_size < model.config.codebook_size:
            raise InvalidInputError("This codec does not belong to this model: they disagree on the codebooks.")
        self.sample_rate = codec.sample_rate
        self._runner = Runner(model, codec, config.slots)
        self._scheduler = Scheduler(config, self._runner.window)
        self._changed = threading.Condition()  # guards the scheduler and _closed
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="csm-engine", daemon=True)
        self._thread.start()
        # A daemon thread inside torch while the interpreter is taken apart crashes the process at its exit.
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed

    def submit(self, request: Request) -> None:
        """Hand a request over; its events come through ``request.emit`` on the engine's thread.

        Raises InvalidInputError (not a prompt of this model), PromptTooLongError, EngineBusyError (queue full) or
        EngineError (closed): then the request was not accepted and gets no event.
        """
        columns, window = self._runner.model.config.num_codebooks + 1, self._runner.window
        prompt, params = request.prompt, request.params
        if prompt.ndim != 2 or prompt.shape[1] != columns or not len(prompt) or prompt.dtype != torch.int64:
            raise InvalidInputError(f"A prompt is int64 [T, {columns}], not {prompt.dtype} {tuple(prompt.shape)}.")
        if params.max_frames < 1 or params.top_k < 1 or not params.temperature >= 0:
            raise InvalidInputError("max_frames and top_k must be at least 1 and temperature at least 0.")
        if (excess := len(prompt) - window) > 0:
            raise PromptTooLongError(f"The prompt is {excess} positions longer than the model's {window}.", excess)
        with self._changed:
            if self._closed:
                raise EngineError("The engine is closed.")
            if not self._scheduler.add(request):
                raise EngineBusyError("All slots are taken and the queue is full: try again in a moment.")
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current frame; every request that is not done fails with EngineError. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            while self._wait():
                self._sweep()
                self._admit()
                self._step()
                self._deliver()
        finally:
            self._abandon()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when that is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._scheduler.idle)
            return not self._closed

    def _sweep(self) -> None:
        """End what was cancelled or is too late, waiting or running."""
        now = time.monotonic()
        with self._changed:
            doomed = {request: reason for request in self._scheduler.waiting if (reason := _overdue(request, now))}
            self._scheduler.drop(doomed)
        for request, reason in doomed.items():
            self._emit(request, End(reason))
        for slot, progress in list(self._scheduler.running.items()):
            if running_reason := _overdue(progress.request, now):
                self._finish(slot, End(running_reason))

    def _admit(self) -> None:
        """Prefill those for whom there is a slot."""
        while admitted := self._next():
            slot, request = admitted
            with self._contain([slot]):
                self._runner.prefill(slot, request)

    def _next(self) -> tuple[int, Request] | None:
        with self._changed:
            return self._scheduler.admit()

    def _step(self) -> None:
        """One frame for all that run."""
        slots = sorted(self._scheduler.running)
        if not slots:
            return
        with self._contain(slots):
            for slot, frame in zip(slots, self._runner.step(slots), strict=True):
                if BROKEN in frame:
                    self._finish(slot, Failure(EngineError("The model's numbers overflowed; nothing can be heard.")))
                else:
                    self._scheduler.running[slot].add(frame)

    def _deliver(self) -> None:
        """Decode and hand out the chunks that are due, then end those that are done."""
        chunks = {
            slot: frames for slot, progress in self._scheduler.running.items() if (frames := progress.take_chunk())
        }
        with self._contain(list(chunks)):
            for slot, pcm in self._runner.decode(chunks).items():
                self._emit(self._scheduler.running[slot].request, Chunk(torch.tensor(chunks[slot]), pcm))
        for slot, progress in list(self._scheduler.running.items()):
            if progress.done:
                self._finish(slot, End(progress.done))

    @contextmanager
    def _contain(self, slots: Sequence[int]) -> Iterator[None]:
        """Whatever goes wrong inside ends the requests in ``slots`` and nobody else's."""
        try:
            yield
        # The boundary of the engine's thread: an error has no caller to rise to, and the other requests must go on.
        except Exception as error:
            logger.exception("a stage of the engine failed; requests that end with it: %d", len(slots))
            for slot in slots:
                if slot in self._scheduler.running:
                    self._finish(slot, Failure(_as_failure(error)))

    def _finish(self, slot: int, event: End | Failure) -> None:
        with self._changed:
            request = self._scheduler.release(slot)
        self._emit(request, event)

    def _emit(self, request: Request, event: Event) -> None:
        with self._contain([]):  # an emit that raises breaks its contract; it must not break the loop
            request.emit(event)

    def _abandon(self) -> None:
        """The thread ends, asked to or not: so does every request."""
        with self._changed:
            asked = self._closed
            self._closed = True
            requests = [progress.request for progress in self._scheduler.running.values()] + self._scheduler.waiting
            self._scheduler.running.clear()
            self._scheduler.drop(requests)
        for request in requests:
            self._emit(request, Failure(EngineError("The engine was closed." if asked else "The engine broke down.")))


def _overdue(request: Request, now: float) -> FinishReason | None:
    if request.cancelled:
        return "cancelled"
    return "timeout" if request.deadline is not None and now >= request.deadline else None


def _as_failure(error: Exception) -> CsmError:
    """One error object for each request: a raised exception belongs to the thread that raises it."""
    failure = EngineError(f"The engine failed while speaking ({type(error).__name__}): try again.")
    failure.__cause__ = error
    return failure
