"""The end of a server: it drains on SIGTERM, gives up when its engine is dead or its model is missing; its log."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx2
import pytest

from csm_core.config import ServerSettings
from csm_core.server.app import create_app
from csm_core.server.logs import log_as_json
from tests.server.live_server import LONG_TEXT, OPEN, serving, wait_for

ROUTE = "/v1/audio/speech"


@contextmanager
def process(model):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "csm_core", "serve", "--model", str(model), "--device", "cpu", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CSM_")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running, f"http://127.0.0.1:{port}"
        finally:
            running.kill()


def is_ready(url):
    try:
        return httpx2.get(url + "/ready", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def speech(text):
    return {"model": "tts-1", "input": text, "voice": "nova", "response_format": "pcm"}


def test_sigterm_lets_a_speech_finish_and_refuses_new_ones(tiny_checkpoint):
    with process(tiny_checkpoint) as (running, url), httpx2.Client(timeout=60) as client:
        wait_for(lambda: is_ready(url), seconds=120)
        fields = speech("It goes on and on. " * 10)
        with client.stream("POST", url + ROUTE, json=fields) as answer:
            pieces = answer.iter_bytes()
            heard = len(next(pieces))
            running.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx2.get(url + "/ready").status_code == 503)
            refused = httpx2.post(url + ROUTE, json=speech("Hi."))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert httpx2.get(url + "/health").status_code == 200
            heard += sum(map(len, pieces))  # would raise if it were cut
        assert running.wait(30) == 0
        lines = [json.loads(line) for line in running.stderr.read().splitlines()]
    spoken = next(line for line in lines if line["event"] == "speech")
    assert spoken["outcome"] == "complete"
    assert spoken["audio_seconds"] == pytest.approx(heard / 48_000, abs=0.001)
    assert spoken["request_id"] == answer.headers["x-request-id"]


def test_a_drain_is_bounded_and_a_second_signal_ends_it(generator):
    app = create_app(ServerSettings(no_auth=True, drain_timeout=0.3), generator)
    with serving(app) as url, httpx2.stream("POST", url + ROUTE, json=speech(LONG_TEXT), timeout=60) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        app.state.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(httpx2.RemoteProtocolError):
            list(pieces)
    assert not app.state.server.failed

    app = create_app(OPEN, generator)
    with serving(app) as url, httpx2.stream("POST", url + ROUTE, json=speech(LONG_TEXT), timeout=60) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        app.state.server.handle_exit(signal.SIGTERM, None)
        app.state.server.handle_exit(signal.SIGINT, None)
        assert app.state.server.should_exit
        with pytest.raises(httpx2.RemoteProtocolError):
            list(pieces)


def test_without_speeches_a_drain_is_over_at_once(generator):
    app = create_app(OPEN, generator)
    with serving(app) as url:
        assert is_ready(url)
        app.state.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: not is_ready(url), seconds=5)


def test_a_dead_engine_ends_the_server(generator):
    app = create_app(OPEN, generator)
    with serving(app) as url:
        with httpx2.stream("POST", url + ROUTE, json=speech(LONG_TEXT), timeout=60) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            generator.close()
            with pytest.raises(httpx2.RemoteProtocolError):
                list(pieces)
        wait_for(lambda: app.state.server.failed)


def test_a_model_that_is_not_there_ends_the_process(tmp_path):
    with process(tmp_path / "nothing") as (running, _):
        assert running.wait(120) == 1
        assert "cannot be loaded" in running.stderr.read()


def test_a_line_is_one_json_object_with_its_error(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    level = root.level
    log_as_json("INFO")
    try:
        try:
            raise ValueError("of two\nlines")
        except ValueError:
            logging.getLogger("csm_core.x").exception("it %s", "failed", extra={"seconds": 1.5})
        logging.getLogger("csm_core.x").debug("not this")
    finally:
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields["event"] == "it failed"
    assert (fields["level"], fields["logger"], fields["seconds"]) == ("error", "csm_core.x", 1.5)
    assert fields["timestamp"].endswith("Z")
    assert "ValueError: of two" in fields["exception"]
