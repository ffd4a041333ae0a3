"""What main.py answers when it is not the caller's fault: silence, a full queue, a deadline, an engine that is gone."""

import pytest
import torch

from csm_core import errors
from csm_core.codec import Codec
from csm_core.config import EngineConfig, Profile, Settings
from csm_core.deploy import cortex
from csm_core.deploy.cortex import Call
from csm_core.generator import Generator
from csm_core.text import TextTokenizer, character_tokenizer

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789[].,?!'"
PROFILE = Profile("tiny", max_chars=60, spell_out=True)
FUNCTIONS = pytest.mark.parametrize("function", [cortex.generate_audio, cortex.stream_audio])


@pytest.fixture
def tokenizer(tiny_model):
    config = tiny_model.config
    return TextTokenizer(character_tokenizer(ALPHABET), config.bos_id, config.eos_id)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidInputError("a", "text"), 422, "invalid_input"),
        (errors.PromptTooLongError("a", 3), 422, "prompt_too_long"),
        (errors.AudioDecodeError("a"), 422, "invalid_audio"),
        (errors.SilentOutputError("a"), 502, "silent_output"),
        (errors.EngineBusyError("a"), 503, "busy"),
        (errors.RequestTimeoutError("a"), 504, "timeout"),
        (errors.EngineError("a"), 500, "engine_error"),
        (errors.CheckpointError("a"), 500, "checkpoint_error"),
        (errors.CsmError("a"), 500, "internal_error"),
    ],
)
def test_every_error_has_a_status(error, status, code):
    refusal = cortex.refusal(error)
    assert (refusal["status_code"], refusal["error"]["code"], refusal["error"]["message"]) == (status, code, "a")
    assert refusal["error"]["param"] == getattr(error, "param", None)
    assert ("retry_after" in refusal["error"]) == (status == 503)


@FUNCTIONS
def test_only_silence_is_an_error_and_nothing_is_sent(tiny_model, tiny_codec, tiny_codec_state, tokenizer, function):
    last = "decoder.model.14.conv.conv.weight"
    silent = Codec(tiny_codec.config, {**tiny_codec_state, last: torch.zeros_like(tiny_codec_state[last])})
    with Generator(tiny_model, silent, tokenizer, PROFILE) as generator:
        answer = function(generator, Call(text="Hello."))
    assert answer["status_code"] == 502
    assert answer["error"]["code"] == "silent_output"


@FUNCTIONS
def test_a_full_queue_says_when_to_come_back(tiny_model, tiny_codec, tokenizer, function):
    settings = Settings(engine=EngineConfig(slots=1, queue_size=0))
    with Generator(tiny_model, tiny_codec, tokenizer, PROFILE, settings) as generator:
        first = cortex.stream_audio(generator, Call(text="Again and again and again. " * 100))
        answer = function(generator, Call(text="Hello."))
        first.close()
    assert answer["status_code"] == 503
    assert answer["error"]["retry_after"] == cortex.RETRY_AFTER_SECONDS


@FUNCTIONS
def test_the_deadline_is_ours(tiny_generator, monkeypatch, function):
    monkeypatch.setattr(cortex, "DEADLINE_SECONDS", 0.0)
    assert function(tiny_generator, Call(text="Hello."))["status_code"] == 504


@FUNCTIONS
def test_a_dead_engine_is_500_and_unhealthy(tiny_generator, function):
    assert cortex.health(tiny_generator)["status"] == "ok"
    tiny_generator.close()
    answer = function(tiny_generator, Call(text="Hello."))
    assert (answer["status_code"], answer["error"]["code"]) == (500, "engine_error")
    health = cortex.health(tiny_generator)
    assert (health["status"], health["status_code"]) == ("failed", 503)


def test_an_error_in_the_middle_is_the_last_event(tiny_generator):
    events = cortex.stream_audio(tiny_generator, Call(text="Again and again and again. " * 100))
    assert '"done": false' in next(events)
    tiny_generator.close()
    last = list(events)[-1]
    assert '"done": true' in last
    assert '"status_code": 500' in last
