"""The other routes: lists, health, figures, and the seeds' own with the client script that calls a deployment."""

import base64
import json
import re
import threading

import pytest
from starlette.testclient import TestClient

import test_phrase as phrase_client
from csm_core.audio import encode_wav
from csm_core.deploy import cortex
from csm_core.server.app import create_app
from csm_core.server.openai import ALIASES
from tests.server.live_server import LONG_TEXT, OPEN, wait_for

PATHS = ["/generate_audio", "/v4/p-1/speak/generate_audio"]


@pytest.fixture
def sample(generator):
    return base64.b64encode(encode_wav(generator.generate("Hi.", speaker=0, seed=1), 24_000)).decode()


# --- lists -----------------------------------------------------------------------------------------------------------


def test_models_are_listed_for_every_kind_of_client(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    names = [model["id"] for model in listed["data"]]
    assert names[0] == "tiny"
    assert {"tts-1", "gpt-4o-mini-tts", "csm-1b"} <= set(names)
    assert all(set(model) == {"id", "object", "created", "owned_by"} for model in listed["data"])
    assert client.get("/v1/models/tts-1").json() == next(m for m in listed["data"] if m["id"] == "tts-1")
    assert client.get("/v1/audio/models").json() == {"models": [{"id": name} for name in names]}
    assert client.get("/v1/models/sesame/nothing").json()["error"]["code"] == "model_not_found"


def test_voices_are_listed_in_both_shapes(client):
    listed = client.get("/v1/audio/voices?model=tts-1").json()
    assert [voice["id"] for voice in listed["voices"]] == list(ALIASES)
    assert listed["object"] == "list"
    assert [(voice["id"], voice["name"]) for voice in listed["data"]] == [(name, name) for name in ALIASES]


def test_the_document_describes_the_bodies(client):
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/audio/speech"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["model", "input", "voice"]
    assert "$ref" not in json.dumps(schema)


# --- the seeds' ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_generate_audio_answers_as_main_py_does(client, generator, sample, path):
    call = {
        "text": "Hello there.",
        "speaker": 1,
        "seed": 3,
        "temperature": 0.7,
        "topk": 9,
        "max_audio_length_ms": 900,
        "context": [{"text": "Hi.", "speaker": 0, "audio": sample}],
    }
    answer = client.post(path, json=call)
    envelope = answer.json()
    assert answer.status_code == 200, envelope
    assert set(envelope) == {"run_id", "result", "run_time_ms"}
    assert envelope["run_id"] == answer.headers["x-request-id"]
    expected = cortex.generate_audio(generator, cortex.Call(**call))
    varying = "processing_time_seconds"
    assert {k: v for k, v in envelope["result"].items() if k != varying} == {
        k: v for k, v in expected.items() if k != varying
    }


@pytest.mark.parametrize("path", [*PATHS, "/generate", "/stream_audio"])
@pytest.mark.parametrize(
    ("call", "status", "param"),
    [
        ({}, 422, "text"),
        ({"text": ""}, 422, "text"),
        ({"text": "a" * 4097}, 422, "text"),
        ({"text": "Hi.", "voice": "../x"}, 422, "voice"),
        ({"text": "Hi.", "context": [{"text": "a", "audio": "!"}]}, 422, "context[0].audio"),
        ([], 400, None),
    ],
)
def test_what_is_wrong_is_named(client, path, call, status, param):
    answer = client.post(path, json=call)
    assert answer.status_code == status
    enveloped = path in PATHS
    result = answer.json()["result"] if enveloped else answer.json()
    assert result["error"]["param"] == param
    assert ("status_code" in result) == enveloped


def test_generate_takes_a_sample_of_the_voice(client, sample):
    def speak(**fields):
        answer = client.post("/generate", json={"text": "Hello.", "seed": 1, "max_length": 500, **fields})
        assert answer.status_code == 200, answer.text
        assert answer.json()["duration_seconds"] <= 0.5
        return answer.json()["audio_data"]

    assert speak(voice_prompt=sample, voice_prompt_text="Hi.") != speak()
    assert speak(voice_prompt=sample, voice_prompt_text="Hi.") == speak(voice_prompt=sample, voice_prompt_text="Hi.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"voice_prompt": "AAAA"}, "voice_prompt_text"),
        ({"voice_prompt": "AAAA", "voice_prompt_text": "Hi."}, "voice_prompt.audio"),
        ({"voice_prompt": 5, "voice_prompt_text": "Hi."}, "voice_prompt.audio"),
        ({"voice_prompt": "AAAA", "voice_prompt_text": "Hi.", "voice": "anna"}, "voice"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused(client, fields, param):
    answer = client.post("/generate", json={"text": "Hello.", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


@pytest.mark.parametrize("arguments", [[], ["--stream"]])
@pytest.mark.parametrize("path", ["", "/v4/p-1/csm", "/generate_audio"])
def test_the_client_script_works_unchanged(live, tmp_path, capsys, path, arguments):
    url, _ = live
    file = tmp_path / "out.wav"
    options = ["--endpoint", url + path, "--out", str(file), "--text", "Hello there.", "--seed", "3", *arguments]
    assert phrase_client.main(options) == 0, capsys.readouterr().err
    assert file.stat().st_size > 44
    assert "model tiny" in capsys.readouterr().out


def test_stream_audio_says_what_failed_in_the_middle(live, generator, tmp_path, capsys):
    url, desk = live
    wait_for(lambda: desk.state == "ready")
    closing = generator.close

    class Closing(phrase_client.PieceWriter):
        def add(self, event):
            super().add(event)
            closing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phrase_client, "PieceWriter", Closing)
        options = ["--endpoint", url, "--out", str(tmp_path / "x.wav"), "--text", LONG_TEXT, "--stream"]
        assert phrase_client.main(options) == 1
    assert "gave up while speaking" in capsys.readouterr().err


# --- operators -------------------------------------------------------------------------------------------------------


def test_health_ready_and_ping(client, generator):
    assert client.get("/health").json() == {
        "status": "ok", "state": "ready", "model": "tiny", "sample_rate": 24_000, "device": "cpu",
    }  # fmt: skip
    assert client.get("/ready").status_code == client.get("/ping").status_code == 200
    client.app.state.desk.draining = True
    statuses = [client.get(path).status_code for path in ("/health", "/ready", "/ping")]
    assert statuses == [200, 503, 503]
    refused = client.post("/v1/audio/speech", json={"model": "tts-1", "input": "Hi.", "voice": "nova"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    generator.close()
    statuses = [client.get(path).status_code for path in ("/health", "/ready", "/ping")]
    assert statuses == [503, 503, 503]


def test_it_answers_while_the_model_is_loading(generator):
    loaded = threading.Event()

    def load():
        loaded.wait(10)
        return generator

    with TestClient(create_app(OPEN, load)) as client:
        assert [client.get(path).status_code for path in ("/health", "/ready", "/ping")] == [200, 503, 204]
        refused = client.post("/generate_audio", json={"text": "Hi."})
        assert (refused.status_code, refused.json()["result"]["error"]["code"]) == (503, "loading")
        assert client.get("/v1/audio/voices").status_code == 200
        loaded.set()
        wait_for(lambda: client.get("/ready").status_code == 200)
        assert client.post("/generate_audio", json={"text": "Hi."}).status_code == 200
        assert generator.alive
    assert not generator.alive  # what the application loaded it also closes


@pytest.mark.parametrize("error", [OSError("no disk"), RuntimeError("no memory")])
def test_a_model_that_cannot_be_loaded_is_a_failed_server(error, caplog):
    def load():
        raise error

    with TestClient(create_app(OPEN, load)) as client:
        wait_for(lambda: client.get("/health").status_code == 503)
        assert client.get("/ready").status_code == 503
        assert client.post("/generate_audio", json={"text": "Hi."}).status_code == 503
    assert str(error) in caplog.text


def test_metrics_count_what_was_spoken_and_name_no_path(client):
    spoken = client.post("/generate_audio", json={"text": "Hello.", "seed": 1}).json()["result"]
    client.post("/generate_audio", json={"text": ""})
    client.get("/someones/private/address")
    client.get("/v1/models/someones-model")
    text = client.get("/metrics").text

    def value(series):
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        assert found, f"{series} is not in\n{text}"
        return float(found[1])

    assert value('csm_requests_total{method="POST",route="/generate_audio",status="200"}') == 1
    assert value('csm_requests_total{method="POST",route="/generate_audio",status="422"}') == 1
    assert value('csm_requests_total{method="GET",route="other",status="404"}') == 1
    assert value('csm_requests_total{method="GET",route="/v1/models/{model:path}",status="404"}') == 1
    assert value('csm_speeches_ended_total{format="wav",outcome="complete"}') == 1
    assert value('csm_speeches_ended_total{format="wav",outcome="invalid_input"}') == 1
    assert value("csm_audio_seconds_total") == pytest.approx(spoken["duration_seconds"], abs=0.001)
    assert value("csm_ttfa_seconds_count") == value("csm_rtf_count") == 1
    assert value("csm_speeches") == 0
    assert "someone" not in text
