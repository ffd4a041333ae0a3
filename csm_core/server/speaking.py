"""One speech, made on a thread of its own and heard on the event loop.

The generator blocks; here its chunks become pieces of bytes that can be awaited. Cancelling tells the engine, which
stops within a frame, and so the thread ends. Knows no HTTP.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from csm_core.audio.formats import FileEncoder, StreamEncoder
from csm_core.audio.tempo import Stretcher
from csm_core.call import Call, about_speech
from csm_core.errors import EngineError
from csm_core.generator import Generator
from csm_core.takes import SpeechStream

GRACE = 30.0  # seconds after its deadline in which an engine that works has answered


@dataclass(frozen=True)
class Order:
    """What a route asks for: the call, the bytes to make of it, and how its voice is found (on the speech's thread).

    ``whole``: one complete file at the end, with true sizes in its header, instead of pieces.
    """

    call: Call
    format: str
    speed: float = 1.0
    whole: bool = False
    find_voice: Callable[[Call], Call] = field(default=lambda call: call)


@dataclass(frozen=True)
class Piece:
    """The next bytes of a speech, how many samples they are of, and when they were there."""

    data: bytes
    samples: int
    made: float = field(default_factory=time.monotonic)


class Speaking:
    """A speech that runs. Everything but ``_speak`` and ``_over`` belongs to the event loop."""

    def __init__(self, generator: Generator, order: Order, timeout: float) -> None:
        self.started = time.monotonic()
        self.sample_rate = generator.sample_rate
        self.samples = 0  # received so far
        self.first_sound: float | None = None  # seconds after the start
        self.spoken = 0.0  # seconds from the start to the last piece
        self.underrun = 0.0  # seconds that a listener, hearing it as it came, waited in the middle
        self._runs_dry = 0.0  # when that listener has heard all
        self._generator = generator
        self._order = order
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()  # None: the thread is done
        self._cancelled = False
        self._stream: SpeechStream | None = None
        self._future: Future[None] | None = None

    @property
    def seconds(self) -> float:
        """Of sound so far."""
        return self.samples / self.sample_rate

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def retakes(self) -> int:
        """Takes that followed a silent one."""
        return sum(take.number > 0 for take in self._stream.takes) if self._stream else 0

    def about(self) -> dict[str, Any]:
        """What is known of it once it is complete."""
        assert self._stream is not None
        return about_speech(self._stream, self._generator.model_name, self.spoken)

    def begin(self, threads: Executor) -> None:
        self._future = threads.submit(contextvars.copy_context().run, self._speak)
        self._future.add_done_callback(self._over)

    def cancel(self) -> None:
        """Stop within a frame. After the end it does nothing."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    async def next(self) -> Piece | None:
        """The next piece, never an empty one; None after the last. Raises what the generator raises."""
        rest = self._timeout + GRACE - self.elapsed
        try:
            async with asyncio.timeout(rest):
                piece = await self._pieces.get()
        except TimeoutError:
            raise StuckError("The engine does not answer any more.") from None
        if piece is None:
            assert self._future is not None
            self._pieces.put_nowait(None)  # who asks again hears the same
            self._future.result()
            return None
        self._account(piece)
        return piece

    def _account(self, piece: Piece) -> None:
        now = piece.made - self.started
        if self.first_sound is None:
            self.first_sound = self._runs_dry = now
        self.underrun += max(0.0, now - self._runs_dry)
        self._runs_dry = max(now, self._runs_dry) + piece.samples / self.sample_rate
        self.spoken = now
        self.samples += piece.samples

    def _speak(self) -> None:
        order, rate = self._order, self.sample_rate
        call = order.find_voice(order.call)
        stretcher = Stretcher(order.speed, rate)
        encoder = FileEncoder(order.format, rate) if order.whole else StreamEncoder(order.format, rate)
        with self._generator.stream(**call.arguments(rate, self._timeout)) as stream:
            self._stream = stream
            if self._cancelled:  # before there was a stream to tell
                stream.cancel()
            samples = 0  # of the bytes that the encoder keeps back
            for chunk in stream:
                sound = stretcher.feed(chunk)
                samples += sound.numel()
                if data := encoder.feed(sound):
                    self._hand(Piece(data, samples))
                    samples = 0
            rest = stretcher.finish()
            if data := encoder.feed(rest) + encoder.finish():
                self._hand(Piece(data, samples + rest.numel()))

    def _over(self, _: Future[None]) -> None:
        self._hand(None)

    def _hand(self, piece: Piece | None) -> None:
        if not self._loop.is_closed():  # a server that was torn down without its lifespan
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class StuckError(EngineError):
    """The engine neither speaks nor ends: only a new process helps."""
