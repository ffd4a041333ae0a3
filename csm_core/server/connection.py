"""One connection as uvicorn's h11 protocol keeps it, ended when its client keeps it for nothing.

uvicorn waits without a limit for a request's head to be complete, and for a client to take the last bytes of a
connection that is closed: one slow client each holds a file descriptor for ever.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedConnection(H11Protocol):
    """Looks at itself every ``tick`` seconds; a head or a farewell that lasts ``patience`` ticks is too slow."""

    tick = 5.0
    patience = 3

    _watch: asyncio.TimerHandle | None = None
    _slow = 0  # ticks in a row in which the client had to do something and did not

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch = self.loop.call_later(self.tick, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        self._slow = self._slow + 1 if self.transport.is_closing() or self._awaits_head() else 0
        if self._slow >= self.patience:
            self.transport.abort()
            return
        self._watch = self.loop.call_later(self.tick, self._look)

    def _awaits_head(self) -> bool:
        between = self.timeout_keep_alive_task is not None  # then uvicorn's own timer runs
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not between and self.conn.their_state is h11.IDLE
