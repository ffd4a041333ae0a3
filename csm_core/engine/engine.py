"""The engine: one thread and its loop over one model. Submit a request, hear its events, close.

Every request that was accepted ends exactly once, whatever happens. Knows no text, voice, retry, asyncio or HTTP.
"""

import atexit
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from csm_core.codec import Codec
from csm_core.config import EngineConfig
from csm_core.engine.prefix_cache import PrefixCache, find_marks
from csm_core.engine.request import Chunk, End, Event, Failure, FinishReason, Request
from csm_core.engine.runner import BROKEN, Runner, Step
from csm_core.engine.scheduler import Progress, Scheduler, cut
from csm_core.errors import CsmError, EngineBusyError, EngineError, InvalidInputError, PromptTooLongError
from csm_core.model.csm import CSM

logger = logging.getLogger(__name__)

# Shares of a device's memory. What the allocator keeps unused is given back when less than SCARCE is free, and if it is
# WORTHWHILE: giving back waits for the device, and what is needed again has to be asked for again.
SCARCE = 0.05
WORTHWHILE = 0.01


@dataclass
class Counts:
    """Positions of prompts since the start: those that were ``read``, and ``skipped`` in so many prefix ``hits``."""

    hits: int = 0
    skipped: int = 0
    read: int = 0


class Engine:
    """Runs requests of any number of threads on one of its own. Only that thread touches the runner or frees a slot."""

    def __init__(self, model: CSM, codec: Codec, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        if codec.num_codebooks != model.config.num_codebooks or codec.config.codebook_size < model.config.codebook_size:
            raise InvalidInputError("This codec does not belong to this model: they disagree on the codebooks.")
        self.sample_rate = codec.sample_rate
        self.config = config
        self.counts = Counts()
        self._device = model.text_embedding.weight.device
        self._lookahead = config.lookahead if config.lookahead is not None else int(self._device.type == "cuda")
        self._runner = Runner(model, codec, config)
        self._runner.warm_up()
        self._scheduler = Scheduler(config, self._runner.window)
        self._prefixes = PrefixCache(config.prefix_cache_bytes)
        self._ahead: tuple[Step, list[Progress]] | None = None  # launched, and not yet read
        self._out_of_memory = self._ended = False  # in this turn of the loop: an allocation failed, a request ended
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

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        with self._changed:
            return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """How many slots are in use."""
        with self._changed:
            return len(self._scheduler.running)

    @property
    def prefix_bytes(self) -> int:
        """What the prefix cache holds."""
        return self._prefixes.nbytes

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
                self._read()
                self._compact()
                self._step()
                self._deliver()
                self._relieve()
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
        for progress in list(self._scheduler.running.values()):
            if running_reason := _overdue(progress.request, now):
                self._finish(progress, End(running_reason))

    def _admit(self) -> None:
        """Give the next request a slot and take what is known of its prompt: one after the other.

        So those who speak wait for one newcomer at most, and of many with one voice all but the first find it known.
        """
        progress = self._next()
        if progress is None:
            return
        with self._contain([progress]):
            slot, prompt = progress.slot, progress.request.prompt
            self._runner.begin(slot, progress.request)
            progress.marks = find_marks(prompt)
            known = self._prefixes.known(progress.marks)
            length = known[-1].end if known else 0
            if known:
                self._runner.load_prefix(slot, self._prefixes.get(known), length)
                self.counts.hits += 1
                self.counts.skipped += length
            progress.pieces = cut(length, len(prompt) - 1, progress.marks, self.config.prefill_piece)
            if not progress.pieces:
                self._let_speak(progress)

    def _next(self) -> Progress | None:
        with self._changed:
            return None if self._scheduler.reader() else self._scheduler.admit()

    def _read(self) -> None:
        """One piece of the newcomer's prompt: those who speak wait for no more than that."""
        if progress := self._scheduler.reader():
            with self._contain([progress]):
                start, stop = progress.pieces.popleft()
                self._runner.prefill(progress.slot, progress.request.prompt, start, stop)
                self.counts.read += stop - start
                if not progress.pieces:
                    self._let_speak(progress)

    def _let_speak(self, progress: Progress) -> None:
        """The prompt is read: keep its context for the next one that begins alike."""
        self._runner.ready(progress.slot, progress.request.prompt)
        progress.speaks = True
        if self._prefixes.budget and len(self._prefixes.known(progress.marks)) < len(progress.marks):
            with self._contain([]):  # no memory for a copy is no reason to fail
                self._prefixes.add(progress.marks, self._runner.save_prefix(progress.slot, progress.marks[-1].end))

    def _compact(self) -> None:
        """Let speakers go on in lower slots where that makes the step smaller."""
        for source, target in self._scheduler.moves():
            with self._contain([self._scheduler.running[source]]):
                self._runner.move(source, target)
                with self._changed:
                    self._scheduler.move(source, target)

    def _step(self) -> None:
        """Launch the next frame of all who speak, then take in this one or, looking ahead, the one before it."""
        launched = self._launch()
        if self._lookahead:
            launched, self._ahead = self._ahead, launched
        if launched:
            self._take_in(*launched)

    def _launch(self) -> tuple[Step, list[Progress]] | None:
        speakers = self._scheduler.speakers()
        if not speakers:
            return None
        with self._contain(speakers):
            step = self._runner.step([progress.slot for progress in speakers])
            for progress in speakers:
                progress.launched += 1
            return step, speakers
        return None

    def _take_in(self, step: Step, speakers: list[Progress]) -> None:
        """Wait for a step's frames. Those of a request that has ended since it was launched are dropped."""
        if not any(self._scheduler.runs(progress) for progress in speakers):
            return
        with self._contain(speakers):
            for progress, frame in zip(speakers, step.frames(), strict=True):
                if not self._scheduler.runs(progress):
                    continue
                if BROKEN in frame:
                    error = EngineError("The model's numbers overflowed; nothing can be heard.")
                    self._finish(progress, Failure(error))
                else:
                    progress.add(frame)

    def _deliver(self) -> None:
        """Decode and hand out the chunks that are due, then end those that are done."""
        running = list(self._scheduler.running.values())
        due = {progress: chunk for progress in running if (chunk := progress.take_chunk())}
        if due:
            with self._contain(list(due)):
                sound = self._runner.decode({progress.slot: chunk for progress, chunk in due.items()})
                for progress, chunk in due.items():
                    self._emit(progress.request, Chunk(torch.tensor(chunk), sound[progress.slot]))
        for progress in running:
            if progress.done and self._scheduler.runs(progress):
                self._finish(progress, End(progress.done))
        if not self._scheduler.running:
            self._ahead = None  # launched for nobody

    def _relieve(self) -> None:
        """After an allocation failed, or a request ended on a device that runs short: give unused memory back."""
        failed, ended = self._out_of_memory, self._ended
        self._out_of_memory = self._ended = False
        if failed:
            self._prefixes.clear()
        if self._device.type == "cuda" and (failed or ended):
            free, total = torch.cuda.mem_get_info(self._device)
            unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            if failed or runs_short(free, unused, total):
                torch.cuda.empty_cache()

    @contextmanager
    def _contain(self, those: Sequence[Progress]) -> Iterator[None]:
        """Whatever goes wrong inside ends the requests of ``those`` and nobody else's."""
        try:
            yield
        # The boundary of the engine's thread: an error has no caller to rise to, and the other requests must go on.
        except Exception as error:
            logger.exception("a stage of the engine failed; requests that end with it: %d", len(those))
            self._out_of_memory |= isinstance(error, torch.OutOfMemoryError | MemoryError)
            error.__traceback__ = None  # it was logged, and its frames hold tensors
            for progress in those:
                if self._scheduler.runs(progress):
                    self._finish(progress, Failure(_as_failure(error)))

    def _finish(self, progress: Progress, event: End | Failure) -> None:
        with self._changed:
            self._scheduler.release(progress)
        self._ended = True
        self._emit(progress.request, event)

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
        self._ahead = None
        for request in requests:
            self._emit(request, Failure(EngineError("The engine was closed." if asked else "The engine broke down.")))


def runs_short(free: int, unused: int, total: int) -> bool:
    """Whether a device with so many ``free`` bytes should get back those that the allocator keeps ``unused``."""
    return free < SCARCE * total and unused >= WORTHWHILE * total


def _overdue(request: Request, now: float) -> FinishReason | None:
    if request.cancelled:
        return "cancelled"
    return "timeout" if request.deadline is not None and now >= request.deadline else None


def _as_failure(error: Exception) -> CsmError:
    """One error object for each request: a raised exception belongs to the thread that raises it."""
    failure = EngineError(f"The engine failed while speaking ({type(error).__name__}): try again.")
    failure.__cause__ = error
    return failure
