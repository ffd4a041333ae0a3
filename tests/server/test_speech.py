"""POST /v1/audio/speech: what is spoken, in which bytes, and what is refused, in OpenAI's words."""

import base64
import json

import httpx2
import pytest
import torch
from starlette.testclient import TestClient

from csm_core.audio import encode_wav, pcm16_bytes
from csm_core.audio.formats import FORMATS, StreamEncoder, encode_audio
from csm_core.codec import Codec
from csm_core.config import ServerSettings
from csm_core.server.app import create_app
from csm_core.server.openai import ALIASES
from tests.server.live_server import LONG_TEXT, OPEN

ROUTE = "/v1/audio/speech"


def body(**fields):
    short = {"response_format": "pcm", "seed": 5, "max_audio_length_ms": 1500}
    return {"model": "tts-1", "input": "Hello there.", "voice": "alloy", **short, **fields}


def speak(client, **fields):
    answer = client.post(ROUTE, json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer


def error_of(answer):
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    envelope = answer.json()
    assert set(envelope) == {"error"}
    assert set(envelope["error"]) == {"message", "type", "param", "code"}
    assert envelope["error"]["message"].endswith(".")
    return envelope["error"]


def events(text):
    blocks = [block for block in text.split("\n\n") if block]
    return [json.loads(block.removeprefix("data: ")) for block in blocks if not block.startswith(":")]


@pytest.fixture
def expected(generator):
    return generator.generate("Hello there.", speaker=1, seed=5, max_audio_length_ms=1500)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_pcm_is_what_the_generator_makes(client, expected):
    answer = speak(client)
    assert answer.content == pcm16_bytes(expected)
    assert "content-length" not in answer.headers
    assert answer.headers["x-request-id"]


def test_a_streamed_wav_leaves_its_sizes_open(client, expected):
    answer = speak(client, response_format="wav")
    assert answer.headers["content-type"] == "audio/wav"
    plain = encode_wav(expected, 24_000)
    unknown = b"\xff" * 4
    assert answer.content == plain[:4] + unknown + plain[8:40] + unknown + plain[44:]


def without_serial(data):
    """Ogg pages have a random number of their stream, and a checksum over it; all other formats come as they are."""
    pages = data.split(b"OggS")
    return b"OggS".join([pages[0], *(page[:10] + page[22:] for page in pages[1:])])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_encoders(client, expected, name):
    answer = speak(client, response_format=name)
    assert answer.headers["content-type"] == FORMATS[name]
    encoder = StreamEncoder(name, 24_000)
    assert without_serial(answer.content) == without_serial(encoder.feed(expected) + encoder.finish())


@pytest.mark.parametrize("name", FORMATS)
def test_a_buffered_answer_is_a_complete_file(client, expected, name):
    answer = speak(client, response_format=name, stream=False)
    assert answer.headers["content-type"] == FORMATS[name]
    assert without_serial(answer.content) == without_serial(encode_audio(expected, 24_000, name))
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert float(answer.headers["x-audio-seconds"]) == pytest.approx(expected.numel() / 24_000, abs=0.001)


def test_mp3_is_the_default(client):
    fields = body()
    del fields["response_format"]
    answer = client.post(ROUTE, json=fields)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/mpeg")


@pytest.mark.parametrize("speed", [0.25, 1.5, 4.0])
def test_speed_changes_the_duration(client, expected, speed):
    for stream in (True, False):
        heard = len(speak(client, speed=speed, stream=stream).content) // 2
        assert heard == pytest.approx(expected.numel() / speed, abs=1)
    usage = events(speak(client, speed=speed, stream_format="sse").text)[-1]["usage"]
    assert usage["output_tokens"] == round(expected.numel() / 1920)


def test_sse_carries_the_same_audio_and_the_usage(client, expected):
    answer = speak(client, stream_format="sse")
    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events(answer.text)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == pcm16_bytes(expected)
    frames = round(expected.numel() / 1920)
    usage = {"input_tokens": 12, "output_tokens": frames, "total_tokens": 12 + frames}
    assert done == {"type": "speech.audio.done", "usage": usage}


# --- voices and models -----------------------------------------------------------------------------------------------


def test_openais_thirteen_voices_are_there_and_two_speakers_differ(client):
    names = "alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split()
    assert sorted(ALIASES) == sorted(names)
    short = {"input": "Hi.", "max_audio_length_ms": 640}
    heard = {name: speak(client, voice=name, **short).content for name in names}
    assert len(set(heard.values())) == 2
    assert speak(client, voice={"id": "alloy"}, **short).content == heard["alloy"]
    assert speak(client, voice="1", **short).content == heard["alloy"]
    assert speak(client, voice="alloy", speaker=0, **short).content == heard["ash"]


def test_a_voice_on_disk_goes_before_the_alias(generator, tmp_path, expected):
    (tmp_path / "nova").mkdir()
    (tmp_path / "nova" / "sample.wav").write_bytes(encode_wav(expected, 24_000))
    (tmp_path / "nova" / "transcript.txt").write_text("Hello there.")
    generator._settings = type(generator._settings)(voices=tmp_path)
    with TestClient(create_app(ServerSettings(no_auth=True, voices=tmp_path), generator)) as client:
        assert speak(client, voice="nova").content != speak(client, voice="coral").content
        assert client.get("/v1/audio/voices").json()["voices"][0] == {"id": "nova", "name": "nova"}


@pytest.mark.parametrize("voice", ["nobody", "", "../nova", "nova/", "a" * 1000, "\0", {"id": "x"}])
def test_an_unknown_voice_is_400_and_lists_the_known(client, voice):
    error = error_of(answer := client.post(ROUTE, json=body(voice=voice)))
    assert (answer.status_code, error["param"]) == (400, "voice")
    assert "alloy" in error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    "model", ["tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15", "csm-1b", "tiny"]
)
def test_these_models_are_accepted(client, model):
    speak(client, model=model, input="Hi.")


def test_another_model_is_404(client):
    answer = client.post(ROUTE, json=body(model="whisper-1"))
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


def test_what_clients_send_beside_is_ignored(client, expected):
    extras = {"instructions": "None", "speed": 1, "language": "en", "volume_multiplier": 2, "stream": None}
    assert speak(client, **extras).content == pcm16_bytes(expected)


def test_context_is_heard(client, expected):
    turn = {"text": "Hi.", "speaker": 0, "audio": base64.b64encode(encode_wav(expected, 24_000)).decode()}
    assert speak(client, context=[turn]).content != pcm16_bytes(expected)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": "!!!"}, "input"),
        ({"input": 5}, "input"),
        ({"input": "a" * 4097}, "input"),
        ({"voice": None}, "voice"),
        ({"voice": 3}, "voice"),
        ({"voice": {}}, "voice"),
        ({"model": 1}, "model"),
        ({"response_format": "ogg"}, "response_format"),
        ({"speed": 0.2}, "speed"),
        ({"speed": 4.1}, "speed"),
        ({"speed": "1"}, "speed"),
        ({"speed": True}, "speed"),
        ({"stream_format": "ws"}, "stream_format"),
        ({"stream": "yes"}, "stream"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"topk": 0}, "topk"),
        ({"speaker": 7}, "speaker"),
        ({"max_audio_length_ms": -1}, "max_audio_length_ms"),
        ({"context": "x"}, "context"),
        ({"context": [{}]}, "context[0].text"),
    ],
)
def test_what_is_wrong_is_400_and_named(client, fields, param):
    answer = client.post(ROUTE, json=body(**fields))
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")


@pytest.mark.parametrize("name", ["model", "input", "voice"])
def test_a_missing_field_is_named(client, name):
    fields = body()
    del fields[name]
    error = error_of(client.post(ROUTE, json=fields))
    assert (error["code"], error["param"]) == ("missing_required_parameter", name)


RAW = {
    "nothing": b"",
    "open": b"{",
    "list": b"[]",
    "null": b"null",
    "bytes": b"\xff\xfe",
    "NaN": b'{"model":"tts-1","input":"Hi.","voice":"alloy","speed":NaN}',
    "infinite": b'{"model":"tts-1","input":"Hi.","voice":"alloy","speed":1e999}',
    "NaN of ours": b'{"model":"tts-1","input":"Hi.","voice":"alloy","response_format":"pcm","temperature":NaN}',
    "infinity of ours": b'{"model":"tts-1","input":"Hi.","voice":"alloy","response_format":"pcm","temperature":1e999}',
    "surrogate": b'{"model":"tts-1","input":"Hi \\ud800","voice":"alloy"}',
    "surrogate in a key": b'{"model":"tts-1","input":"Hi","voice":"alloy","\\ud800":1}',
    "surrogate in the voice": b'{"model":"tts-1","input":"Hi","voice":"\\udfff"}',
    "deep": b'{"model":"tts-1","input":' + b"[" * 100_000,
    "deep in an extra": b'{"model":"tts-1","input":"Hi","voice":"alloy","x":' + b'{"a":' * 50_000,
    "huge number": b'{"model":"tts-1","input":"Hi","voice":"alloy","seed":' + b"9" * 100_000 + b"}",
    "null byte": b'{"model":"tts-1","input":"\\u0000","voice":"alloy","response_format":"pcm"}',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
def test_hostile_json_is_400(client, raw):
    answer = client.post(ROUTE, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.content) < 600
    error_of(answer)


def test_a_null_byte_in_a_text_is_left_out(client, expected):
    assert speak(client, input="Hel\0lo there.").content == pcm16_bytes(expected)


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_what_a_foreign_page_may_send_is_415(client, media_type):
    answer = client.post(ROUTE, content=json.dumps(body()), headers={"content-type": media_type})
    assert answer.status_code == 415
    error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", ROUTE, 405),
        ("PUT", "/generate", 405),
        ("GET", "/", 404),
        ("POST", ROUTE + "/", 404),
        ("GET", "/v1/models/%ff%00", 404),
        ("GET", "/v1/../../etc/passwd", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_addresses_and_methods_answer_in_the_envelope(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    error_of(answer)
    assert ("allow" in answer.headers) == (status == 405)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": "sse"}])
def test_only_silence_is_502_and_not_worth_repeating(make_generator, tiny_codec, tiny_codec_state, fields):
    last = "decoder.model.14.conv.conv.weight"
    silent = Codec(tiny_codec.config, {**tiny_codec_state, last: torch.zeros_like(tiny_codec_state[last])})
    with TestClient(create_app(OPEN, make_generator(silent))) as client:
        answer = client.post(ROUTE, json=body(**fields))
    assert answer.status_code == 502
    assert error_of(answer)["code"] == "silent_output"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": "sse"}])
def test_too_slow_is_504(generator, fields):
    with TestClient(create_app(ServerSettings(no_auth=True, request_timeout=0.0), generator)) as client:
        answer = client.post(ROUTE, json=body(**fields))
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "timeout"
    assert answer.headers["x-should-retry"] == "false"


def test_a_dead_engine_is_503(client, generator):
    generator.close()
    answer = client.post(ROUTE, json=body())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert error_of(answer)["code"] == "engine_error"


def test_a_mistake_of_ours_is_500_without_a_traceback(client, generator, monkeypatch):
    monkeypatch.setattr(generator, "stream", lambda **_: {}["secret"])
    answer = client.post(ROUTE, json=body())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error_of(answer)["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_sse_says_what_failed_in_the_middle(live, generator):
    url, _ = live
    with httpx2.stream(
        "POST", url + ROUTE, json=body(input=LONG_TEXT, stream_format="sse", max_audio_length_ms=None), timeout=30
    ) as answer:
        lines = answer.iter_lines()
        assert "speech.audio.delta" in next(lines)
        generator.close()
        last = [line for line in lines if line][-1]
    failed = json.loads(last.removeprefix("data: "))
    assert failed["type"] == "speech.audio.error"
    assert failed["error"]["code"] == "engine_error"
