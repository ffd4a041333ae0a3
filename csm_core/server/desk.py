"""Who may speak now: the model's state, how many speeches run, and the limits on them. One per application.

Lives on the event loop; knows no route and no bytes of HTTP.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Literal

from anyio.to_thread import run_sync

from csm_core.config import ServerSettings
from csm_core.errors import CsmError
from csm_core.generator import Generator
from csm_core.server.meters import Meters
from csm_core.server.refusals import RefusedError
from csm_core.server.speaking import Order, Speaking, StuckError

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]
RETRY_AFTER_LOADING = 5  # seconds; a small model is there by then, a large one is not asked for every moment


class Desk:
    """Takes orders for speech. ``settings`` and ``meters`` may be read by everybody."""

    def __init__(self, settings: ServerSettings, meters: Meters) -> None:
        self.settings = settings
        self.meters = meters
        self.generator: Generator | None = None
        self.draining = False
        self.running = 0
        self._failed = False
        self._of_caller: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(settings.max_speeches, thread_name_prefix="csm-speech")

    @property
    def state(self) -> State:
        if self._failed or (self.generator is not None and not self.generator.alive):
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self.generator is None else "ready"

    async def load(self, loader: Callable[[], Generator]) -> None:
        """Load on a thread. Whatever keeps it from being loaded makes the state "failed" and is raised."""
        try:
            # Abandoned when the server is stopped meanwhile: a load of minutes must not outlast the drain.
            self.generator = await run_sync(loader, abandon_on_cancel=True)
        finally:
            self._failed = self.generator is None

    def ready(self) -> Generator:
        """The generator, or RefusedError 503 that says why there is none."""
        if self.state == "failed":
            raise RefusedError(503, "engine_error", "The engine has failed; this server restarts.", None, 5)
        if self.draining:
            raise RefusedError(503, "draining", "This server is being stopped; another one answers.", None, 1)
        if self.generator is None:
            raise RefusedError(503, "loading", "The model is being loaded.", None, RETRY_AFTER_LOADING)
        return self.generator

    @asynccontextmanager
    async def speak(self, order: Order, caller: str) -> AsyncIterator[Speaking]:
        """A speech that runs for the length of the block, and is stopped when the block is left.

        Raises RefusedError: 503 when this server has no room or is not ready, 429 when the caller has too many.
        """
        generator = self.ready()
        if self.running >= self.settings.max_speeches:
            self.meters.refused.labels("busy").inc()
            raise RefusedError(503, "busy", "All places are taken: try again in a moment.", None, self._retry_after())
        limit = self.settings.key_speeches
        if limit is not None and self._of_caller[caller] >= limit:
            self.meters.refused.labels("key_speeches").inc()
            message = f"At most {limit} speeches of one key run at a time: wait for one to end."
            raise RefusedError(429, "concurrency_limit_exceeded", message, None, self._retry_after())
        speech = Speaking(generator, order, self.settings.request_timeout)
        self._enter(caller)
        outcome = "cut off"  # the client has gone, or takes nothing
        try:
            speech.begin(self._threads)
            yield speech
            outcome = "complete"
        except CsmError as error:
            outcome = error.code
            if isinstance(error, StuckError):
                self._failed = True
            raise
        finally:
            speech.cancel()
            self._leave(caller)
            self._note(speech, order, caller, outcome)

    def _enter(self, caller: str) -> None:
        self.running += 1
        self._of_caller[caller] += 1
        self.meters.speeches.set(self.running)

    def _leave(self, caller: str) -> None:
        self.running -= 1
        self._of_caller[caller] -= 1
        if not self._of_caller[caller]:
            del self._of_caller[caller]
        self.meters.speeches.set(self.running)

    def _retry_after(self) -> int:
        """Seconds until a place is likely to be free: what speeches last here, as far as known."""
        return min(60, max(1, round(self.meters.usual_seconds)))

    def _note(self, speech: Speaking, order: Order, caller: str, outcome: str) -> None:
        self.meters.speech(speech, order.format, outcome)
        figures = {
            "caller": caller,
            "format": order.format,
            "outcome": outcome,
            "characters": len(order.call.text) if isinstance(order.call.text, str) else 0,
            "audio_seconds": round(speech.seconds, 3),
            "seconds": round(speech.spoken, 3),
            "ttfa_seconds": None if speech.first_sound is None else round(speech.first_sound, 3),
            "retakes": speech.retakes,
        }
        logger.info("speech", extra=figures)

    def close(self) -> None:
        """End the threads; what still runs is waited for unless the engine is the reason."""
        self._threads.shutdown(wait=self.state != "failed")
