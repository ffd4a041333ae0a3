"""The official ``openai`` package against a live server, as applications use it."""

import base64
import io
import json
import wave

import openai
import pytest

from csm_core.audio import encode_wav, pcm16_bytes
from csm_core.config import ServerSettings, key_digest
from csm_core.server.app import create_app
from tests.server.live_server import serving, wait_for

KEY = "the-key-of-this-test"
TEXT = "Hello there."
EXTRA = {"seed": 5, "max_audio_length_ms": 1500}


@pytest.fixture
def app(generator):
    return create_app(ServerSettings(keys=(key_digest(KEY),)), generator)


@pytest.fixture
def connect(app):
    with serving(app) as url:

        def connect(key=KEY, retries=0):
            return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=60)

        yield connect


@pytest.fixture
def expected(generator):
    return generator.generate(TEXT, speaker=1, **EXTRA)


def create(client, **fields):
    speech = {"model": "gpt-4o-mini-tts", "voice": "coral", "input": TEXT, "response_format": "pcm"}
    return client.audio.speech.create(**{**speech, "extra_body": EXTRA, **fields})


def answered(app, status):
    """How many times; the last one may be counted a moment after its client has read it."""
    labels = {"route": "/v1/audio/speech", "method": "POST", "status": str(status)}
    registry = app.state.desk.meters.registry
    wait_for(lambda: registry.get_sample_value("csm_requests_total", labels))
    return registry.get_sample_value("csm_requests_total", labels)


def test_create(connect, expected):
    with connect() as client:
        answer = create(client, instructions="Speak calmly.")
        assert answer.content == pcm16_bytes(expected)
        buffered = create(client, response_format="wav", extra_body={**EXTRA, "stream": False})
    assert buffered.content == encode_wav(expected, 24_000)
    with wave.open(io.BytesIO(buffered.content)) as file:
        assert file.getnframes() == expected.numel()


def test_streaming_to_a_file(connect, expected, tmp_path):
    with connect() as client:
        speech = client.audio.speech.with_streaming_response
        fields = {"model": "tts-1", "voice": "coral", "input": TEXT, "response_format": "pcm"}
        with speech.create(**fields, extra_body=EXTRA) as answer:
            answer.stream_to_file(tmp_path / "speech.pcm")
            assert answer.headers["content-type"] == "audio/pcm"
            assert answer.request_id
    assert (tmp_path / "speech.pcm").read_bytes() == pcm16_bytes(expected)


def test_sse(connect, expected):
    with connect() as client:
        fields = {"model": "gpt-4o-mini-tts", "voice": {"id": "coral"}, "input": TEXT, "response_format": "pcm"}
        raw = client.audio.speech.with_streaming_response
        with raw.create(**fields, stream_format="sse", extra_body=EXTRA) as answer:
            lines = [line for line in answer.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert b"".join(base64.b64decode(e["audio"]) for e in events[:-1]) == pcm16_bytes(expected)
    assert events[-1]["usage"]["output_tokens"] == round(expected.numel() / 1920)


def test_models(connect):
    with connect() as client:
        names = [model.id for model in client.models.list()]
        assert {"tiny", "tts-1"} <= set(names)
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve("nothing")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"input": ""}, openai.BadRequestError, "input"),
        ({"voice": "nobody"}, openai.BadRequestError, "voice"),
        ({"speed": 9}, openai.BadRequestError, "speed"),
        ({"model": "nothing"}, openai.NotFoundError, "model"),
    ],
)
def test_errors_are_the_packages_own_and_are_not_retried(connect, app, fields, error, param):
    with connect(retries=2) as client, pytest.raises(error) as refused:
        create(client, **fields)
    assert refused.value.param == param
    assert refused.value.request_id
    assert refused.value.body["message"] in str(refused.value)
    assert answered(app, refused.value.status_code) == 1


def test_a_wrong_key(connect):
    with connect("another-key-entirely") as client, pytest.raises(openai.AuthenticationError) as refused:
        create(client)
    assert refused.value.code == "invalid_api_key"


def test_busy_is_retried_after_what_the_server_says(connect, app, expected):
    desk = app.state.desk
    desk.running = desk.settings.max_speeches  # full, until the second attempt
    refused = desk.meters.refused.labels("busy")

    class Freed(type(refused)):
        def inc(self, amount=1):
            super().inc(amount)
            desk.running = 0

    refused.__class__ = Freed
    desk.meters.usual_seconds = 1.0
    with connect(retries=2) as client:
        assert create(client).content == pcm16_bytes(expected)
    assert refused._value.get() == 1


def test_what_would_fail_again_is_not_retried(connect, app, generator, monkeypatch):
    monkeypatch.setattr(generator, "stream", lambda **_: {}["mistake"])
    with connect(retries=2) as client, pytest.raises(openai.InternalServerError):
        create(client)
    assert answered(app, 500) == 1
