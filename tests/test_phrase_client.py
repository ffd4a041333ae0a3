"""test_phrase.py, the client at the repository's root, against endpoints of every mood over real HTTP."""

import base64
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import wave
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import test_phrase as client
from csm_core.deploy.emulate import Emulator, running

ROOT = Path(__file__).parents[1]
RATE = 24_000


def tone(seconds=0.5, amplitude=8000):
    samples = (round(amplitude * math.sin(index / 10)) for index in range(round(seconds * RATE)))
    return b"".join(sample.to_bytes(2, "little", signed=True) for sample in samples)


def wav(pcm):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(pcm)
    return file.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def good(**extra):
    return {"audio_data": b64(wav(tone())), "format": "wav", "encoding": "base64", "duration_seconds": 0.5, **extra}


@contextmanager
def endpoint(*answers):
    """A server that gives these (status, headers, body) in turn, the last one for ever. Yields its URL and requests."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, dict(self.headers), json.loads(body), time.monotonic()))
            status, headers, content = answers[min(len(seen), len(answers)) - 1]
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("CSM_ENDPOINT", raising=False)
    monkeypatch.delenv("CEREBRIUM_TOKEN", raising=False)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.wav"


@pytest.fixture
def call(out, capsys):
    """Run the client: its exit code, its output and its complaints."""

    def run(url, *arguments):
        code = client.main(["--endpoint", url, "--out", str(out), "--text", "Hello.", *arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return run


@pytest.fixture
def waits(monkeypatch):
    """The pauses that the client makes between attempts, without making them."""
    pauses = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    return pauses


# --- one call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enveloped", [True, False], ids=["envelope", "plain JSON"])
def test_a_phrase_is_saved_and_described(call, out, enveloped):
    result = good(processing_time_seconds=0.25, model="tiny", seed=7)
    body = {"run_id": "1", "result": result, "run_time_ms": 999} if enveloped else result
    with endpoint((200, {}, body)) as (url, seen):
        code, printed, _ = call(
            url, "--token", "t", "--speaker", "1", "--seed", "7", "--topk", "5", "--temperature", "0.5"
        )
    assert code == 0
    assert out.read_bytes() == wav(tone())
    for words in ("out.wav", "0.50 s", "model tiny", "seed 7", "server 0.25 s", "RTF 0.50"):
        assert words in printed
    path, headers, sent, _ = seen[0]
    assert path == "/generate_audio"
    assert headers["Authorization"] == "Bearer t"
    assert sent == {"text": "Hello.", "speaker": 1, "seed": 7, "topk": 5, "temperature": 0.5}


def test_run_time_of_the_envelope_is_used_when_the_result_has_none(call):
    with endpoint((200, {}, {"result": good(), "run_time_ms": 1500})) as (url, _):
        assert "server 1.50 s, RTF 3.00" in call(url)[1]


def test_endpoint_and_token_come_from_the_environment(out, monkeypatch):
    with endpoint((200, {}, good())) as (url, seen):
        monkeypatch.setenv("CSM_ENDPOINT", url)
        monkeypatch.setenv("CEREBRIUM_TOKEN", "from env")
        assert client.main(["--out", str(out)]) == 0
    assert seen[0][1]["Authorization"] == "Bearer from env"
    assert seen[0][2]["text"]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ("http://h", "http://h/F"),
        ("http://h/", "http://h/F"),
        ("http://h:1/v4/p-1/csm", "http://h:1/v4/p-1/csm/F"),
        ("http://h/v4/p-1/csm/", "http://h/v4/p-1/csm/F"),
        ("http://h/v4/p-1/csm/generate_audio", "http://h/v4/p-1/csm/F"),
        ("http://h/v4/p-1/csm/stream_audio", "http://h/v4/p-1/csm/F"),
        ("http://h/v4/p-1/csm/speak", "http://h/v4/p-1/csm/speak"),
        ("http://h/generate?x=1", "http://h/generate?x=1"),
    ],
)
def test_the_address_is_completed(given, called):
    for function in ("generate_audio", "stream_audio"):
        assert client.complete_url(given, function) == called.replace("F", function)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--endpoint", client.EXAMPLE],
        ["--endpoint", "http://h", "--out", "/no/such/folder/x.wav"],
        ["--endpoint", "http://h", "--speaker", "x"],
    ],
)
def test_a_wrong_call_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        client.main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(message="why", param=None, **extra):
    return {"run_id": "1", "result": {"error": {"message": message, "param": param, **extra}}, "run_time_ms": 1}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"message": "no token"}, "CEREBRIUM_TOKEN"),
        (401, {"detail": "no token"}, "no token"),
        (403, b"", "refused this token"),
        (404, b"<html>not here</html>", "api.cerebrium.ai/v4/p-xxxx/csm/generate_audio"),
        (413, b"", "too large"),
        (422, refusal("must be a number.", "speaker"), "speaker: must be a number."),
        (422, {"error": "plain words"}, "plain words"),
        (422, {"result": "odd"}, "refused the input"),
        (422, [1], "refused the input"),
        (500, refusal("broken"), "broken"),
        (501, refusal("not here"), "not here"),
        (307, b"", "redirects are not followed"),
    ],
)
def test_a_refusal_is_one_sentence_and_not_retried(call, out, status, body, words):
    with endpoint((status, {"location": "http://h/"} if status == 307 else {}, body)) as (url, seen):
        code, printed, complaint = call(url)
    assert code == 1
    assert str(status) in complaint
    assert words in complaint
    assert printed == ""
    assert len(seen) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"result": {"error": "model not loaded", "traceback": "secret"}}, "model not loaded"),
        ({"result": {"status": "ok"}}, "no audio"),
        ({"result": "text"}, "no audio"),
        ([1], "JSON object"),
        (b"<html>", "JSON object"),
        ({"result": {"audio_data": "a!b"}}, "no audio"),
        ({"result": {"audio_data": 3}}, "no audio"),
        ({"result": good(audio_data="")}, "empty"),
        ({"result": good(audio_data=b64(wav(b"")))}, "silent"),
        ({"result": good(audio_data=b64(wav(b"\0" * 48_000)))}, "silent"),
        ({"result": good(audio_data=b64(wav(tone(amplitude=10))))}, "silent"),
    ],
)
def test_a_good_status_without_speech_is_a_failure(call, out, body, words):
    with endpoint((200, {}, body)) as (url, _):
        code, _, complaint = call(url)
    assert code == 1
    assert words in complaint
    assert "secret" not in complaint
    assert not out.exists()


def test_quiet_speech_is_not_silence(call):
    with endpoint((200, {}, good(audio_data=b64(wav(tone(amplitude=200)))))) as (url, _):
        assert call(url)[0] == 0


def test_another_format_is_saved_as_it_is(call, out):
    with endpoint((200, {}, good(audio_data=b64(b"fLaC..."), duration_seconds=2.0))) as (url, _):
        code, printed, _ = call(url)
    assert code == 0
    assert "2.00 s" in printed
    assert out.read_bytes() == b"fLaC..."


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1", "refused the connection"),
        ("http://name.invalid", "cannot be reached"),
        ("localhost:8000", "cannot be called"),
        ("http://", "cannot be called"),
        ("ftp://h/x", "cannot be called"),
    ],
)
def test_an_endpoint_that_is_not_there(call, url, words):
    code, _, complaint = call(url)
    assert code == 1
    assert words in complaint


def test_https_to_a_plain_server_is_explained(call):
    with endpoint((200, {}, good())) as (url, _):
        assert "http://" in call(url.replace("http:", "https:"))[2]


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_endpoint_is_asked_again(call, waits, status):
    with endpoint((status, {}, b""), (status, {}, b""), (200, {}, good())) as (url, seen):
        code, _, complaint = call(url)
    assert code == 0
    assert len(seen) == 3
    assert complaint.count(str(status)) == 2
    assert 1 <= waits[0] <= 2
    assert 2 <= waits[1] <= 3


def test_retries_are_bounded(call, waits):
    with endpoint((503, {}, refusal("all slots are taken"))) as (url, seen):
        code, _, complaint = call(url, "--retries", "2")
        assert call(url, "--retries", "0")[0] == 1
    assert code == 1
    assert len(seen) == 3 + 1
    assert len(waits) == 2
    assert "all slots are taken" in complaint


@pytest.mark.parametrize(
    ("headers", "body", "low", "high"),
    [
        ({"retry-after": "7"}, b"", 7, 8),
        ({"retry-after": "0"}, b"", 1, 2),
        ({"retry-after": "soon"}, b"", 1, 2),
        ({"retry-after": "86400"}, b"", 60, 60),
        ({"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}, b"", 60, 60),
        ({"retry-after": "Fri, 01 Jan 2010 00:00:00 GMT"}, b"", 1, 2),
        ({}, refusal(retry_after=5), 5, 6),
        ({}, refusal(retry_after="x"), 1, 2),
    ],
)
def test_retry_after_is_honoured_and_capped(call, waits, headers, body, low, high):
    with endpoint((429, headers, body), (200, {}, good())) as (url, _):
        assert call(url)[0] == 0
    assert low <= waits[0] <= high


def test_silence_reported_by_the_endpoint_is_not_asked_for_again(call, waits):
    with endpoint((502, {}, refusal("every take was silent", code="silent_output"))) as (url, seen):
        code, _, complaint = call(url)
    assert code == 1
    assert "every take was silent" in complaint
    assert len(seen) == 1
    assert waits == []


# --- streaming -------------------------------------------------------------------------------------------------------

STREAM = {"content-type": "text/event-stream"}
DONE = 'data: {"done": true, "model": "tiny"}\n\n'


def piece(pcm, **extra):
    return "data: " + json.dumps({"audio": b64(pcm), "sample_rate": RATE, "done": False, **extra}) + "\n\n"


@pytest.mark.parametrize(
    "body",
    [
        piece(tone(0.25)) + piece(tone(0.25)) + DONE,
        (piece(tone(0.25)) + piece(tone(0.25)) + DONE).replace("data: ", "data: data: "),
        (": hello\n\nevent: audio\n" + piece(tone(0.25)) + piece(tone(0.25)) + DONE).replace("\n", "\r\n"),
        piece(tone(0.25)) + "data:\n\n" + piece(tone(0.25)) + "data: {}\n\n" + DONE + "data: [DONE]\n\n",
    ],
    ids=["plain", "data twice", "CRLF, comments and event names", "blanks and [DONE]"],
)
def test_a_stream_is_written_to_the_file(call, out, body):
    with endpoint((200, STREAM, body.encode())) as (url, seen):
        code, printed, complaint = call(url + "/v4/p-1/csm/generate_audio", "--stream")
    assert (code, complaint) == (0, "")
    assert seen[0][0] == "/v4/p-1/csm/stream_audio"
    assert seen[0][1]["Accept"] == "text/event-stream"
    with wave.open(str(out)) as file:
        assert file.getframerate() == RATE
        assert file.readframes(-1) == tone(0.25) * 2
    for words in ("0.50 s", "model tiny", "first sound after", "RTF"):
        assert words in printed


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (piece(tone()), "ended early"),
        ("", "ended early"),
        (DONE, "silent"),
        (piece(b"\0" * 9600) + DONE, "silent"),
        (piece(tone()) + 'event: error\ndata: {"error": {"message": "engine stopped"}}\n\n', "engine stopped"),
        ('data: {"status_code": 422, "error": {"message": "empty", "param": "text"}}\n\n', "text: empty"),
        ('data: {"audio": "a!"}\n\n', "16-bit PCM"),
        (piece(b"123") + DONE, "16-bit PCM"),
        ('data: {"audio": 3}\n\n', "16-bit PCM"),
        ("data: {broken\n\n", "not JSON"),
    ],
)
def test_a_broken_stream_is_a_failure(call, body, words):
    with endpoint((200, STREAM, body.encode())) as (url, _):
        code, _, complaint = call(url, "--stream")
    assert code == 1
    assert words in complaint


def test_a_connection_that_breaks_leaves_a_playable_file(call, out):
    body = piece(tone()).encode() + b": still there\n\n" * 1000
    with endpoint((200, {**STREAM, "content-length": "99999"}, body)) as (url, _):
        code, _, complaint = call(url, "--stream")
    assert code == 1
    assert "broke" in complaint
    with wave.open(str(out)) as file:
        assert file.getnframes() == RATE / 2


def test_an_endpoint_that_does_not_stream_is_explained(call):
    with endpoint((200, {"content-type": "application/json"}, good())) as (url, _):
        assert "without --stream" in call(url, "--stream")[2]
    with endpoint((422, {}, refusal("empty", "text"))) as (url, _):
        assert "text: empty" in call(url, "--stream")[2]


# --- against the emulator, as a program ------------------------------------------------------------------------------

STAND_IN = f"""
import json as _json
import threading as _threading

_WAV = {b64(wav(tone()))!r}
_PCM = {b64(tone(0.25))!r}
_go_on = _threading.Event()


def generate_audio(text, speaker=0):
    if not text:
        return {{"status_code": 422, "error": {{"message": "say something", "param": "text"}}}}
    return {{"audio_data": _WAV, "duration_seconds": 0.5, "model": "stand-in"}}


def stream_audio(text):
    yield "data: " + _json.dumps({{"audio": _PCM, "sample_rate": {RATE}}}) + "\\n\\n"
    yield "data: " + _json.dumps({{"audio": _PCM, "sample_rate": {RATE}}}) + "\\n\\n"
    _go_on.wait(30)
    yield "data: " + _json.dumps({{"audio": _PCM, "sample_rate": {RATE}}}) + "\\n\\n"
    yield "data: " + _json.dumps({{"done": True}}) + "\\n\\n"
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    main = tmp_path_factory.mktemp("app") / "main.py"
    main.write_text(STAND_IN)
    return Emulator(main, token="right")


@pytest.fixture(scope="module")
def emulated(emulator):
    with running(emulator) as url:
        yield url


def program(url, out, *arguments, token="right"):
    environment = {**os.environ, "CSM_ENDPOINT": url, "CEREBRIUM_TOKEN": token}
    command = [sys.executable, str(ROOT / "test_phrase.py"), "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_program_speaks_through_the_emulator(emulated, out):
    done = program(emulated, out, "--text", "Hello.")
    assert done.returncode == 0, done.stderr
    assert "model stand-in" in done.stdout
    assert out.read_bytes() == wav(tone())


@pytest.mark.parametrize(
    ("path", "arguments", "token", "words"),
    [
        ("", ["--text", ""], "right", "say something"),
        ("", ["--text", "a", "--seed", "1"], "right", "seed"),
        ("", ["--text", "a"], "wrong", "403"),
        ("", ["--text", "a"], "", "401"),
        ("/nothing", ["--text", "a"], "right", "404"),
    ],
)
def test_the_emulators_refusals_reach_the_terminal(emulated, out, path, arguments, token, words):
    done = program(emulated + path, out, *arguments, token=token)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def frames(path):
    try:
        with wave.open(str(path)) as file:
            return file.getnframes()
    except (FileNotFoundError, EOFError):
        return 0


def test_the_file_grows_while_the_stream_runs(call, emulator, emulated, out):
    worker = threading.Thread(target=call, args=(emulated, "--stream", "--token", "right"))
    worker.start()
    deadline = time.monotonic() + 20
    while frames(out) < RATE / 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    before = frames(out), worker.is_alive()
    emulator.functions["stream_audio"].__globals__["_go_on"].set()
    worker.join(timeout=30)
    assert before == (RATE / 2, True)  # two pieces, while the third is still to be spoken
    assert frames(out) == RATE * 3 / 4
