"""main.py with a tiny real model, imported and called as the platform does: the contract, and hostile input."""

import base64
import io
import json
import tomllib
import wave
from pathlib import Path

import numpy as np
import pytest
import requests
import soundfile

import test_phrase as client
from csm_core.deploy import cortex
from csm_core.deploy.emulate import Emulator, running
from csm_core.errors import CheckpointError

ROOT = Path(__file__).parents[1]
TOKEN = "t0ken"
LONG_TEXT = "This sentence is spoken again and again. " * 400


def sound(seconds=1.0, rate=24_000, channels=1, container="WAV", amplitude=0.3):
    """A buzz as the base64 of a sound file."""
    wave_form = np.tile(np.repeat(np.float32([amplitude, -amplitude]), 20), round(seconds * rate / 40))
    file = io.BytesIO()
    soundfile.write(file, np.stack([wave_form] * channels, axis=1), rate, format=container)
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def emulator(tiny_checkpoint, tmp_path_factory):
    voices = tmp_path_factory.mktemp("voices")
    (voices / "anna").mkdir()
    (voices / "anna" / "sample.wav").write_bytes(base64.b64decode(sound()))
    (voices / "anna" / "transcript.txt").write_text("A buzz.")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CSM_MODEL", str(tiny_checkpoint))
        environment.setenv("CSM_DEVICE", "cpu")
        environment.setenv("CSM_VOICES", str(voices))
        environment.setenv("HF_HUB_ENABLE_HF_TRANSFER", "0")  # main.py only sets what is unset
        emulator = Emulator(ROOT / "main.py", token=TOKEN)
    yield emulator
    emulator.functions["health"].__globals__["_generator"].close()


@pytest.fixture(scope="module")
def url(emulator):
    with running(emulator) as url:
        yield url


def call(url, function, body=None, **options):
    body = body if isinstance(body, bytes) else json.dumps(body or {})
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return requests.post(f"{url}/{function}", data=body, headers=headers, timeout=60, **options)


def result(answer):
    assert answer.status_code == 200, answer.text[:500]
    return answer.json()["result"]


def events(answer):
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(block.removeprefix("data: ")) for block in answer.text.split("\n\n") if block]


def pcm_of(audio_data):
    with wave.open(io.BytesIO(base64.b64decode(audio_data))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        return file.readframes(-1)


# --- the contract ----------------------------------------------------------------------------------------------------


def test_exactly_the_endpoints_of_the_contract_are_published(emulator):
    assert set(emulator.functions) == {"generate_audio", "stream_audio", "transcribe", "health"}
    assert len((ROOT / "main.py").read_text().splitlines()) <= 80


def test_generate_audio(url):
    speech = result(call(url, "generate_audio", {"text": "Hello there.", "speaker": 1, "seed": 3}))
    assert speech["format"] == "wav"
    assert speech["encoding"] == "base64"
    assert len(pcm_of(speech["audio_data"])) / 2 / 24_000 == pytest.approx(speech["duration_seconds"], abs=0.001)
    assert speech["processing_time_seconds"] > 0
    assert (speech["model"], speech["sample_rate"], speech["seed"], speech["takes"]) == ("tiny", 24_000, 3, 1)
    assert speech["finish_reason"] in ("eos", "length", "silence")


def test_all_parameters_are_taken(url):
    body = {
        "text": "Hello.",
        "speaker": 0,
        "max_audio_length_ms": 400,
        "temperature": 0,
        "topk": 5,
        "seed": -1,
        "voice": "anna",
        "context": [
            {"text": "Hi.", "speaker": 1, "audio": sound()},
            {"text": "Ho.", "audio": "data:audio/flac;base64," + sound(container="FLAC")},
            {"text": "Hu.", "speaker": 0, "audio": sound(rate=8_000, channels=2)},
        ],
    }
    speech = result(call(url, "generate_audio", body))
    assert 0 < speech["duration_seconds"] <= 0.4
    plain = {"text": "Hello.", "max_audio_length_ms": 400, "temperature": 0, "seed": -1}
    assert result(call(url, "generate_audio", plain))["audio_data"] != speech["audio_data"]


def test_null_is_the_default(url):
    names = ("speaker", "max_audio_length_ms", "temperature", "topk", "context", "voice")
    plain = result(call(url, "generate_audio", {"text": "Hi.", "seed": 1}))
    nulls = result(call(url, "generate_audio", {"text": "Hi.", "seed": 1, **dict.fromkeys(names)}))
    assert nulls["audio_data"] == plain["audio_data"]


def test_a_stream_is_the_same_speech_in_pieces(url):
    body = {"text": "Hello there.", "seed": 5, "max_audio_length_ms": 1200}
    whole = result(call(url, "generate_audio", body))
    *pieces, last = events(call(url, "stream_audio", body))
    assert len(pieces) > 1
    assert b"".join(base64.b64decode(piece["audio"]) for piece in pieces) == pcm_of(whole["audio_data"])
    assert all(piece["sample_rate"] == 24_000 and piece["done"] is False for piece in pieces)
    assert last["done"] is True
    assert "audio" not in last
    for name in ("duration_seconds", "model", "seed", "finish_reason", "takes"):
        assert last[name] == whole[name]


def test_health_and_transcribe(url):
    assert result(call(url, "health")) == {"status": "ok", "model": "tiny", "sample_rate": 24_000, "device": "cpu"}
    answer = call(url, "transcribe", {"audio": sound()})
    assert answer.status_code == 501
    assert "cannot transcribe" in answer.json()["result"]["error"]["message"]


def test_a_listener_that_leaves_frees_the_slot(url):
    with call(url, "stream_audio", {"text": LONG_TEXT}, stream=True) as answer:
        assert next(answer.iter_lines()).startswith(b"data: ")
    # The rest of the long text takes minutes, the call waits one at most.
    result(call(url, "generate_audio", {"text": "Next.", "max_audio_length_ms": 400}))


def test_a_model_that_cannot_be_loaded_fails_the_deployment(monkeypatch, tmp_path):
    monkeypatch.setenv("CSM_MODEL", str(tmp_path))
    monkeypatch.setenv("HF_HUB_ENABLE_HF_TRANSFER", "0")
    with pytest.raises(CheckpointError):
        Emulator(ROOT / "main.py")


def test_our_deadline_comes_before_the_platforms():
    with (ROOT / "cerebrium.toml").open("rb") as file:
        scaling = tomllib.load(file)["cerebrium"]["scaling"]
    assert scaling["response_grace_period"] > cortex.DEADLINE_SECONDS


@pytest.mark.parametrize("arguments", [[], ["--stream"]], ids=["whole", "stream"])
def test_the_client_script_speaks_through_it(url, tmp_path, capsys, arguments):
    out = tmp_path / "out.wav"
    command = ["--endpoint", url, "--token", TOKEN, "--text", "Hello.", "--seed", "2", "--out", str(out), *arguments]
    assert client.main(command) == 0
    printed = capsys.readouterr().out
    assert "model tiny" in printed
    assert "RTF" in printed
    with wave.open(str(out)) as file:
        assert file.getnframes() > 1000


# --- hostile input ---------------------------------------------------------------------------------------------------


def turn(**changes):
    return {"context": [{"text": "Hi.", "speaker": 0, "audio": sound(), **changes}]}


HOSTILE = {
    "no text": ({"text": None}, "text"),
    "empty text": ({"text": ""}, "text"),
    "blank text": ({"text": " \n\t "}, "text"),
    "nothing to speak": ({"text": "!?... 🎉"}, "text"),
    "10 MB text": ({"text": "abc " * 2_500_000}, "text"),
    "only NUL": ({"text": "\0\0"}, "text"),
    "lone surrogate": ({"text": "Hello \ud800."}, "text"),
    "text is a number": ({"text": 7}, "text"),
    "text is a list": ({"text": ["Hello."]}, "text"),
    "NaN temperature": ({"temperature": float("nan")}, "temperature"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature"),
    "negative temperature": ({"temperature": -0.1}, "temperature"),
    "temperature in quotes": ({"temperature": "0.9"}, "temperature"),
    "temperature is true": ({"temperature": True}, "temperature"),
    "negative top-k": ({"topk": -1}, "topk"),
    "top-k zero": ({"topk": 0}, "topk"),
    "top-k of 1e400": ({"topk": 10**400}, "topk"),
    "fractional top-k": ({"topk": 2.5}, "topk"),
    "speaker x": ({"speaker": "x"}, "speaker"),
    "speaker -1": ({"speaker": -1}, "speaker"),
    "speaker that the voice lacks": ({"speaker": 7}, "speaker"),
    "speaker is a list": ({"speaker": []}, "speaker"),
    "seed in words": ({"seed": "seven"}, "seed"),
    "seed of 1e400": ({"seed": 10**400}, "seed"),
    "no length": ({"max_audio_length_ms": 0}, "max_audio_length_ms"),
    "NaN length": ({"max_audio_length_ms": float("nan")}, "max_audio_length_ms"),
    "unknown voice": ({"voice": "nobody"}, "voice"),
    "voice that leaves its folder": ({"voice": "../../../etc"}, "voice"),
    "voice is a number": ({"voice": 3}, "voice"),
    "context is text": ({"context": "Hi."}, "context"),
    "context of words": ({"context": ["Hi."]}, "context"),
    "endless context": ({"context": [{}] * 1000}, "context"),
    "empty turn": ({"context": [{}]}, "context[0].text"),
    "turn without audio": ({"context": [{"text": "Hi."}]}, "context[0].audio"),
    "turn with a typo": (turn(speeker=1), "context[0]"),
    "speaker x in a turn": (turn(speaker="x"), "context[0].speaker"),
    "blank words in a turn": (turn(text=" "), "context"),
    "lone surrogate in a turn": (turn(text="\ud800"), "context"),
    "audio that is no audio": (turn(audio=base64.b64encode(b"just some words" * 50).decode()), "context[0].audio"),
    "bad base64 character": (turn(audio=sound().replace("A", "*", 1)), "context[0].audio"),
    "cut off base64": (turn(audio=sound()[:-5]), "context[0].audio"),
    "cut off wav": (turn(audio=sound()[:40]), "context[0].audio"),
    "empty audio": (turn(audio=""), "context[0].audio"),
    "audio is a number": (turn(audio=5), "context[0].audio"),
    "two minutes of audio": (turn(audio=sound(120, rate=4000, container="FLAC")), "context[0].audio"),
    "silent audio": (turn(audio=sound(amplitude=0.0)), "context[0].audio"),
    "unknown parameter": ({"pitch": 2}, "pitch"),
}


@pytest.mark.parametrize("function", ["generate_audio", "stream_audio"])
@pytest.mark.parametrize("name", HOSTILE)
def test_bad_input_is_422_with_a_sentence_and_the_parameter(url, function, name):
    change, param = HOSTILE[name]
    answer = call(url, function, {"text": "Hello.", **change})
    assert answer.status_code == 422, answer.text[:300]
    error = answer.json()["result"]["error"]
    assert error["param"] == param
    assert 10 < len(error["message"]) < 400
    assert error["message"].endswith(".")
    assert "Traceback" not in answer.text
    assert call(url, "health").status_code == 200


@pytest.mark.parametrize(
    ("function", "body", "status"),
    [
        ("generate_audio", b'{"text": ', 400),
        ("generate_audio", b"Hello.", 400),
        ("generate_audio", b'["Hello."]', 400),
        ("generate_audio", b"[" * 100_000, 400),
        ("generate_audio", b'{"text": "' + b"a" * 40_000_000 + b'"}', 413),
        ("generate_audio", b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", 422),
        ("_generator", b"{}", 404),
        ("_cortex", b"{}", 404),
        ("load", b"{}", 404),
    ],
)
def test_bad_bodies_and_hidden_names(url, function, body, status):
    answer = call(url, function, body)
    assert answer.status_code == status
    assert "Traceback" not in answer.text
    assert set(answer.json()) == {"run_id", "result", "run_time_ms"}
    assert call(url, "health").status_code == 200


def test_an_hour_of_audio_is_refused(url):
    hour = np.zeros(3600 * 8_000, np.int16)  # packs to some 100 kB, so that it is not the body's size that is refused
    hour[:8_000:2] = 9_000
    file = io.BytesIO()
    soundfile.write(file, hour, 8_000, format="FLAC")
    body = {"text": "Hello.", **turn(audio=base64.b64encode(file.getvalue()).decode())}
    answer = call(url, "generate_audio", body)
    assert answer.status_code == 422
    assert answer.json()["result"]["error"]["code"] == "invalid_audio"


def test_a_wrong_token_never_reaches_the_model(url):
    for headers, status in (({}, 401), ({"Authorization": "Bearer no"}, 403)):
        answer = requests.post(f"{url}/generate_audio", json={"text": "Hello."}, headers=headers, timeout=10)
        assert answer.status_code == status


@pytest.mark.parametrize(
    "text", ["Hello\0 there.", "a\u202eb", "é" * 50, "0" * 60, "<script>alert(1)</script>", "{}[0]"]
)
def test_odd_text_is_spoken_or_refused_but_never_an_error_of_ours(url, text):
    answer = call(url, "generate_audio", {"text": text, "max_audio_length_ms": 400})
    assert answer.status_code in (200, 422)
