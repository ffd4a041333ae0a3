"""Runs the application with uvicorn: where it may listen, how it drains, and when the process gives up.

On SIGTERM or SIGINT it refuses new speeches, is not ready any more, lets those finish that run, and ends; a second
signal ends it at once. An engine that is dead, or a model that cannot be loaded, ends it with exit code 1, so that
whoever started it can start another.
"""

import ipaddress
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn

from csm_core.config import ServerSettings
from csm_core.errors import InvalidInputError
from csm_core.generator import Generator
from csm_core.server.app import create_app
from csm_core.server.connection import BoundedConnection
from csm_core.server.desk import Desk

logger = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds for what is still being sent when nothing runs any more
GIVE_UP = 15.0  # seconds that a process whose engine has failed has for its farewell


@dataclass(frozen=True)
class Address:
    """Where to listen. With a certificate (and its key) it speaks TLS."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: str | None = None
    private_key: str | None = None

    @property
    def is_local(self) -> bool:
        """Only reachable from this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def check_address(settings: ServerSettings, address: Address) -> ServerSettings:
    """The settings to run with there: without keys open on this machine, and refused on any other address.

    Raises InvalidInputError.
    """
    if settings.keys or settings.no_auth:
        return settings
    if not address.is_local:
        raise InvalidInputError(
            f"{address.host} can be reached by others and there is no API key: set CSM_API_KEYS, listen on 127.0.0.1, "
            "or write --no-auth if everybody may use it.",
            "host",
        )
    return replace(settings, no_auth=True)


def serve(settings: ServerSettings, address: Address, load: Callable[[], Generator]) -> int:
    """Serve until a signal; returns the exit code. ``load`` is called once the port is open.

    Raises InvalidInputError for an address that is refused, and ends the process (as uvicorn does) for a taken port.
    """
    app = create_app(check_address(settings, address), load)
    config = uvicorn.Config(
        app,
        host=address.host,
        port=address.port,
        http=BoundedConnection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a forwarded address is what anybody may claim
        timeout_keep_alive=75,  # longer than balancers keep theirs (AWS: 60), so that it is them who close
        timeout_graceful_shutdown=int(LAST_WORDS),
        ssl_certfile=address.certificate,
        ssl_keyfile=address.private_key,
    )
    server = DrainingServer(config, app.state.desk, _end_in_any_case)
    server.run()
    return 1 if server.failed else 0


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which keeps listening while it drains, so that callers hear why they are refused."""

    def __init__(self, config: uvicorn.Config, desk: Desk, on_failure: Callable[[], None]) -> None:
        super().__init__(config)
        self.failed = False
        self._on_failure = on_failure
        self._desk = desk
        self._drained_by = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the next one ends."""
        if self._desk.draining:
            super().handle_exit(sig, frame)
            return
        self._drained_by = time.monotonic() + self._desk.settings.drain_timeout
        self._desk.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to stop listening."""
        if await super().on_tick(counter):
            return True
        if self._desk.state == "failed":
            logger.error("the engine has failed: this process ends")
            self.failed = True
            self._on_failure()
            return True
        if not self._desk.draining:
            return False
        if late := time.monotonic() >= self._drained_by:
            logger.warning("the drain took too long; speeches that are cut off: %d", self._desk.running)
        return late or not self._desk.running


def _end_in_any_case() -> None:
    """An engine that hangs in the GPU's driver keeps its thread, and so the process, for ever."""
    watchdog = threading.Timer(GIVE_UP, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
