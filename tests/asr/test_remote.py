"""A transcription endpoint of somebody else: a real HTTP server that answers as such endpoints do, well or badly."""

import io
import json
import threading
from collections.abc import Iterator
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import soundfile
import torch

from csm_core.asr import Passage, load_transcriber
from csm_core.asr import remote as remote_module
from csm_core.asr.remote import RemoteTranscriber
from csm_core.errors import TranscriptionError, UnsupportedLanguageError

RATE = 24_000
KEY = "a-key-that-nobody-may-see"
VERBOSE = {
    "text": " Good morning. ",
    "language": "english",
    "segments": [{"start": 0.5, "end": 1.25, "text": " Good morning.", "id": 0}],
}


class Endpoint(ThreadingHTTPServer):
    """Remembers what it was sent; answers with what ``reply`` holds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.reply: tuple[int, bytes] = (200, json.dumps(VERBOSE).encode())
        self.seen: list[tuple[str, dict[str, str], dict[str, bytes]]] = []
        self.wait = threading.Event()
        self.wait.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Answering(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = BytesParser().parsebytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
        )
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in message.get_payload()
        }
        self.server.seen.append((self.path, dict(self.headers), fields))
        self.server.wait.wait(5)
        status, answer = self.server.reply
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url + "/elsewhere")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.wait.set()
        server.shutdown()
        thread.join()


def test_it_asks_as_openais_clients_do(endpoint: Endpoint) -> None:
    transcriber = load_transcriber(f"openai:{endpoint.url}/", model="whisper-large", api_key=KEY)
    pcm = 0.5 * torch.sin(torch.arange(2 * RATE) * 0.1)
    transcript = transcriber.transcribe(pcm, RATE, "en")
    assert transcript.text == "Good morning."
    assert transcript.language == "en"
    assert transcript.duration_seconds == 2.0
    assert transcript.segments == (Passage(0.5, 1.25, "Good morning."),)
    ((path, headers, fields),) = endpoint.seen
    assert path == "/v1/audio/transcriptions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (fields["model"], fields["response_format"], fields["language"]) == (
        b"whisper-large",
        b"verbose_json",
        b"en",
    )
    samples, rate = soundfile.read(io.BytesIO(fields["file"]))
    assert (len(samples), rate) == (32_000, 16_000)
    assert abs(samples).max() == pytest.approx(0.5, abs=0.02)


def test_without_key_and_language_none_is_sent(endpoint: Endpoint) -> None:
    transcript = RemoteTranscriber(endpoint.url).transcribe(torch.zeros(RATE), RATE)
    assert transcript.language == "english"  # as the endpoint found
    ((_, headers, fields),) = endpoint.seen
    assert "Authorization" not in headers
    assert "language" not in fields


def test_plain_json_is_enough(endpoint: Endpoint) -> None:
    endpoint.reply = (200, b'{"text": "Good morning.", "segments": [{"start": null, "text": 3}, 7]}')
    transcript = RemoteTranscriber(endpoint.url).transcribe(torch.zeros(3 * RATE), RATE)
    assert transcript.segments == (Passage(0.0, 3.0, "Good morning."),)


def test_long_audio_goes_in_pieces_and_times_are_of_the_whole(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "PIECE_SECONDS", 4.0)
    pcm = torch.sin(torch.arange(6 * RATE) * 0.1)
    pcm[3 * RATE : 3 * RATE + RATE // 2] = 0
    transcript = RemoteTranscriber(endpoint.url).transcribe(pcm, RATE)
    assert len(endpoint.seen) == 2
    assert transcript.text == "Good morning. Good morning."
    assert [passage.start for passage in transcript.segments] == pytest.approx([0.5, 3.75], abs=0.2)


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((500, b"Traceback ... secret"), "answered 500"),
        ((401, b"{}"), "answered 401"),
        ((302, b""), "answered 302"),  # not followed: the key would go to another address
        ((200, b"<html>"), "something else than JSON"),
        ((200, b"[]"), "without a text"),
        ((200, b'{"text": null}'), "without a text"),
    ],
)
def test_bad_answers_are_errors_that_tell_no_secrets(
    endpoint: Endpoint, reply: tuple[int, bytes], sentence: str
) -> None:
    endpoint.reply = reply
    with pytest.raises(TranscriptionError, match=sentence) as caught:
        RemoteTranscriber(endpoint.url, api_key=KEY).transcribe(torch.zeros(RATE), RATE)
    assert KEY not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(endpoint.seen) == 1


def test_a_language_that_it_refuses_is_the_callers_error(endpoint: Endpoint) -> None:
    endpoint.reply = (400, b'{"error": {"message": "Invalid language \'xx\'", "param": "language"}}')
    with pytest.raises(UnsupportedLanguageError, match="'xx'"):
        RemoteTranscriber(endpoint.url).transcribe(torch.zeros(RATE), RATE, "xx")


def test_no_endpoint_and_a_slow_one_are_errors(endpoint: Endpoint) -> None:
    endpoint.wait.clear()
    with pytest.raises(TranscriptionError, match="in time"):
        RemoteTranscriber(endpoint.url, timeout=0.2).transcribe(torch.zeros(RATE), RATE)
    with pytest.raises(TranscriptionError, match="cannot be reached"):
        RemoteTranscriber("http://127.0.0.1:1/v1").transcribe(torch.zeros(RATE), RATE)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000/v1", "", "ftp://host/v1"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        RemoteTranscriber(url)
