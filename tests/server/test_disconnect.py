"""What happens when clients go, stop reading, or the engine breaks down while they listen. Real connections."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest

from csm_core.audio import pcm16_bytes
from csm_core.config import ServerSettings
from csm_core.server.app import create_app
from csm_core.server.connection import BoundedConnection
from tests.server.live_server import LONG_TEXT, OPEN, serving, wait_for

ROUTE = "/v1/audio/speech"
WAYS = pytest.mark.parametrize(
    ("path", "fields"),
    [
        (ROUTE, {}),
        (ROUTE, {"stream_format": "sse"}),
        (ROUTE, {"stream": False}),
        ("/generate_audio", {}),
        ("/stream_audio", {}),
        ("/generate", {}),
    ],
    ids=["audio", "sse", "buffered", "generate_audio", "stream_audio", "generate"],
)


def body(**fields):
    return {"model": "tts-1", "input": LONG_TEXT, "text": LONG_TEXT, "voice": "1", "response_format": "pcm", **fields}


def request(url, path, fields, receive_buffer=None):
    """A connection that has sent a request, for the client to treat as it likes."""
    address = urlsplit(url)
    content = json.dumps(fields).encode()
    headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect((address.hostname, address.port))
    connection.sendall(f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content)
    return connection


def running(generator):
    return len(generator._engine._scheduler.running)


@WAYS
def test_a_client_that_goes_frees_its_slot_at_once(live, generator, path, fields):
    url, desk = live
    if path != ROUTE:
        fields = {**fields, "voice": None}
    connection = request(url, path, body(speaker=1, **fields))
    wait_for(lambda: running(generator))
    connection.close()
    assert wait_for(lambda: not running(generator)) < 2.0
    wait_for(lambda: not desk.running)


def test_a_client_that_is_killed_while_it_waits_leaves_the_queue(live, generator):
    url, desk = live
    speakers = [request(url, ROUTE, body()) for _ in range(4)]
    wait_for(lambda: desk.running == 4 and running(generator) == 2)
    wait_for(lambda: len(generator._engine._scheduler.waiting) == 2)
    for connection in reversed(speakers):
        connection.close()
    wait_for(lambda: not desk.running)
    wait_for(lambda: not running(generator) and not generator._engine._scheduler.waiting)


class ImpatientConnection(BoundedConnection):
    tick = 0.1


def connections(app):
    return len(app.state.server.server_state.connections)


def test_a_client_that_takes_nothing_is_cut_off(generator):
    app = create_app(ServerSettings(no_auth=True, write_timeout=0.3), generator)
    with serving(app, ImpatientConnection, send_buffer=8192) as url, request(url, ROUTE, body(), receive_buffer=4096):
        wait_for(lambda: app.state.desk.running)
        wait_for(lambda: not app.state.desk.running, seconds=60)
        wait_for(lambda: not connections(app))


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nx-slow: "])
def test_a_client_that_never_ends_its_head_is_cut_off(generator, sent):
    app = create_app(OPEN, generator)
    with serving(app, ImpatientConnection) as url:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=10) as connection:
            connection.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        with httpx2.Client() as client:  # and one that only keeps its connection is not
            assert client.get(url + "/health").status_code == 200
            time.sleep(0.6)
            assert connections(app) == 1
            assert client.get(url + "/health").status_code == 200


def test_an_engine_that_breaks_down_cuts_the_body(live, generator):
    url, _ = live
    with httpx2.stream("POST", url + ROUTE, json=body(), timeout=30) as answer:
        assert answer.status_code == 200
        pieces = answer.iter_bytes()
        assert next(pieces)
        generator.close()
        with pytest.raises(httpx2.RemoteProtocolError):
            list(pieces)


def test_the_head_waits_for_the_first_sound(live, generator):
    """Both slots are taken; who waits gets nothing, then, because the engine breaks down, an ordinary error."""
    url, desk = live
    busy = [request(url, ROUTE, body()) for _ in range(2)]
    wait_for(lambda: running(generator) == 2)
    waiting = request(url, ROUTE, body())
    wait_for(lambda: desk.running == 3)
    waiting.settimeout(0.3)
    with pytest.raises(TimeoutError):
        waiting.recv(1)
    generator.close()
    waiting.settimeout(10)
    assert waiting.recv(12) == b"HTTP/1.1 500"
    for connection in [*busy, waiting]:
        connection.close()


def test_many_at_once_each_hear_their_own(make_generator):
    generator = make_generator(slots=4, queue_size=64)
    texts = [f"Number {index}." for index in range(12)]
    expected = {text: pcm16_bytes(generator.generate(text, seed=7, max_audio_length_ms=500)) for text in texts}
    app = create_app(OPEN, generator)
    with serving(app) as url, httpx2.Client(timeout=60) as client, ThreadPoolExecutor(12) as pool:

        def call(text):
            return client.post(url + ROUTE, json=body(input=text, voice="0", seed=7, max_audio_length_ms=500))

        for text, answer in zip(texts, pool.map(call, texts), strict=True):
            assert answer.status_code == 200
            heard, known = (np.frombuffer(data, "<i2").astype(int) for data in (answer.content, expected[text]))
            assert heard.shape == known.shape
            assert abs(heard - known).max() <= 2  # sums of a larger batch are rounded in another order


def test_who_finds_no_place_is_told_when_to_come_back(generator):
    app = create_app(ServerSettings(no_auth=True, max_speeches=2), generator)
    with serving(app) as url:
        busy = [request(url, ROUTE, body()) for _ in range(2)]
        wait_for(lambda: app.state.desk.running == 2)
        answer = httpx2.post(url + ROUTE, json=body(input="Hi."))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "x-should-retry" not in answer.headers
        for connection in busy:
            connection.close()
        wait_for(lambda: not app.state.desk.running)
        assert httpx2.post(url + ROUTE, json=body(input="Hi.")).status_code == 200


def test_a_full_engine_queue_is_503_too(make_generator):
    with serving(create_app(OPEN, make_generator(slots=1, queue_size=0))) as url:
        busy = request(url, ROUTE, body())
        assert busy.recv(12) == b"HTTP/1.1 200"
        answer = httpx2.post(url + ROUTE, json=body(input="Hi."))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
        assert answer.headers["retry-after"]
        busy.close()


def test_the_event_loop_is_free_while_it_speaks(live):
    url, _ = live
    with contextlib.ExitStack() as busy:
        for _ in range(3):
            busy.enter_context(request(url, ROUTE, body()))
        waits = []
        for _ in range(5):
            started = time.monotonic()
            assert httpx2.get(url + "/health", timeout=30).status_code == 200
            waits.append(time.monotonic() - started)
    assert sorted(waits)[2] < 2.0  # a speech of these lasts longer even on a quick machine
