"""A live server: the application on a free port of 127.0.0.1, in a thread, with real connections."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from csm_core.config import ServerSettings
from csm_core.server.connection import BoundedConnection
from csm_core.server.run import DrainingServer

OPEN = ServerSettings(no_auth=True)
LONG_TEXT = "This sentence is spoken again and again. " * 90


@contextmanager
def serving(app, connection=BoundedConnection, send_buffer=None):
    """The application on a port, in a thread; yields its URL. Checks that nothing of it stays behind."""
    threads = set(threading.enumerate())
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer:  # the kernel's own takes minutes of speech before anybody notices that nobody reads
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    config = uvicorn.Config(app, log_config=None, ws="none", http=connection, timeout_graceful_shutdown=5)
    server = app.state.server = DrainingServer(config, app.state.desk, lambda: None)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    with listener:
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
    assert not thread.is_alive()
    left = {thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("csm-speech")}
    assert not left


def wait_for(condition, seconds=20.0):
    """Until it holds; how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.002)
    return time.monotonic() - started
