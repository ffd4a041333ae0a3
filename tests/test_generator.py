"""The public calls: what goes in, what comes out, what is refused, and who may call at once."""

import gc
import inspect
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import csm_core
from csm_core.audio import write_wav
from csm_core.codec import Codec
from csm_core.config import EngineConfig, Profile, Settings
from csm_core.engine.request import Request
from csm_core.errors import (
    CheckpointError,
    EngineBusyError,
    EngineError,
    InvalidInputError,
    PromptTooLongError,
    RequestCancelledError,
    RequestTimeoutError,
)
from csm_core.generator import Generator, load, load_csm_1b, longest_seconds, pick_device
from csm_core.model.csm import ABSENT, CSM
from csm_core.prompt import Segment
from csm_core.text import TextTokenizer, character_tokenizer
from csm_core.voices import Voice

SHORT = {"max_audio_length_ms": 800}
TWO = "Hello there, you. Good evening to all of you."  # two sentences


def tone(seconds: float, pitch: float = 220.0) -> torch.Tensor:
    return 0.3 * torch.sin(torch.arange(int(seconds * 24_000)) * 2 * math.pi * pitch / 24_000)


@pytest.fixture
def prompts(tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that reaches the engine, which gets it all the same."""
    seen: list[Request] = []
    submit = tiny_generator._engine.submit

    def watched(request: Request) -> None:
        seen.append(request)
        submit(request)

    monkeypatch.setattr(tiny_generator._engine, "submit", watched)
    return seen


def ids(generator: Generator, text: str, speaker: int) -> list[int]:
    return generator._tokenizer.encode(text, speaker)


def text_column(prompt: torch.Tensor) -> list[int]:
    return [token for token in prompt[:, -1].tolist() if token != ABSENT]


def test_signatures_are_the_originals_and_alike() -> None:
    names = [list(inspect.signature(getattr(Generator, call)).parameters) for call in ("generate", "stream", "speak")]
    assert names[0][:7] == ["self", "text", "speaker", "context", "max_audio_length_ms", "temperature", "topk"]
    assert names[0] == names[1] == names[2]
    assert list(inspect.signature(load_csm_1b).parameters) == ["device"]


def test_speech(tiny_generator: Generator) -> None:
    speech = tiny_generator.speak("Hello.", seed=3, **SHORT)
    assert speech.audio.shape == (10 * 1920,)
    assert speech.audio.dtype == torch.float32
    assert speech.codes.shape == (10, 2)
    assert speech.codes.dtype == torch.int64
    assert speech.finish_reason == "length"
    assert speech.sample_rate == tiny_generator.sample_rate == 24_000
    assert speech.duration_seconds == 0.8
    assert [(take.temperature, take.top_k, take.seed) for take in speech.takes] == [(0.8, 20, 3)]
    assert 0 < speech.first_sound_seconds <= speech.processing_time_seconds
    assert speech.rtf == speech.processing_time_seconds / 0.8


def test_three_calls_one_speech(tiny_generator: Generator) -> None:
    wish: dict[str, Any] = {
        "text": TWO,
        "speaker": 1,
        "seed": -5,
        "temperature": 1.1,
        "topk": 9,
        "max_audio_length_ms": 7000,
    }
    speech = tiny_generator.speak(**wish)
    assert torch.equal(tiny_generator.generate(**wish), speech.audio)
    assert torch.equal(tiny_generator.generate_codes(**wish), speech.codes)
    assert torch.equal(torch.cat(list(tiny_generator.stream(**wish))), speech.audio)


def test_the_audio_is_the_codes(tiny_generator: Generator, tiny_codec: Codec) -> None:
    """Streamed in chunks, with only the last 5 ms faded."""
    speech = tiny_generator.speak("Hello.", seed=3, **SHORT)
    torch.testing.assert_close(speech.audio[:-120], tiny_codec.decode(speech.codes)[:-120], rtol=0, atol=1e-5)


def test_seeds(tiny_generator: Generator) -> None:
    first = tiny_generator.speak("Hello.", **SHORT)
    other = tiny_generator.speak("Hello.", **SHORT)
    assert first.seed != other.seed
    assert not torch.equal(first.codes, other.codes)
    assert torch.equal(tiny_generator.speak("Hello.", seed=first.seed, **SHORT).audio, first.audio)


def test_temperature_zero_knows_no_seed(tiny_generator: Generator) -> None:
    codes = [tiny_generator.generate_codes("Hello.", seed=seed, temperature=0, **SHORT) for seed in (1, 2)]
    assert torch.equal(*codes)


def test_the_prompt_is_the_template(tiny_generator: Generator, prompts: list[Request]) -> None:
    context = [Segment(1, "Who are you?", tone(0.5)), Segment(0, "A friend!", tone(0.3))]
    tiny_generator.generate("Come in, 2 of you.", speaker=1, context=context, seed=1, **SHORT)
    prompt = prompts[0].prompt
    turns = [("Who are you?", 1), ("A friend!", 0), ("Come in, two of you.", 1)]
    assert text_column(prompt) == [token for text, speaker in turns for token in ids(tiny_generator, text, speaker)]
    sounds = prompt[prompt[:, 0] != ABSENT, :2]
    encoded = [tiny_generator.codec.encode(segment.audio) for segment in context]
    end = torch.zeros(1, 2, dtype=torch.int64)
    assert torch.equal(sounds, torch.cat([encoded[0], end, encoded[1], end]))


def test_each_sentence_continues_the_one_before(tiny_generator: Generator, prompts: list[Request]) -> None:
    text = "Hello there, you. Good evening to all of you. How are you today?"
    context = [Segment(0, "Before.", tone(0.3))]
    speech = tiny_generator.speak(text, context=context, seed=1)
    assert len(prompts) == 3
    assert [request.follow_up for request in prompts] == [False, True, True]
    assert len({request.params.seed for request in prompts}) == 3
    assert [take.sentence for take in speech.takes] == [0, 1, 2]
    sentences = ["Hello there, you.", "Good evening to all of you.", "How are you today?"]
    told = [["Before.", sentences[0]], ["Before.", *sentences[:2]], ["Before.", *sentences[1:]]]
    for request, texts in zip(prompts, told, strict=True):
        assert text_column(request.prompt) == [token for text in texts for token in ids(tiny_generator, text, 0)]
    spoken = prompts[1].prompt[prompts[1].prompt[:, 0] != ABSENT, :2]
    first = torch.cat([tiny_generator.codec.encode(tone(0.3)), torch.zeros(1, 2, dtype=torch.int64)])
    assert torch.equal(spoken[: len(first)], first)
    assert torch.equal(spoken[len(first) : -1], speech.codes[: len(spoken) - len(first) - 1])


def test_sentences_join_without_a_click(tiny_generator: Generator) -> None:
    """The tiny voice is noise with steps of its own; at a join there is none."""
    single = tiny_generator.speak("Hello there, you.", seed=1)
    both = tiny_generator.speak(TWO, seed=1)
    join = single.audio.numel()
    assert torch.equal(both.audio[:join], single.audio)
    assert both.audio.numel() > join + 1920
    assert both.audio[join - 5 : join + 5].diff().abs().max() < 0.5 * both.audio.diff().abs().max()


def test_the_length_is_a_limit_for_the_whole(tiny_generator: Generator, prompts: list[Request]) -> None:
    speech = tiny_generator.speak(TWO, seed=1, max_audio_length_ms=2000)
    assert speech.audio.numel() <= 2000 * 24
    assert speech.finish_reason == "length"
    assert len(prompts) == 1  # 0 frames were left: the second sentence is not begun


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("a" * 240, 39.0), ("7", 3.8), ("こんにちは", 5.5), ("Hello.", 3.9)],
    ids=["long", "digit", "kana", "word"],
)
def test_the_cap_is_a_generous_backstop(text: str, seconds: float) -> None:
    assert longest_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("text", ["", "   ", "...", "\ud800 half", None, 7, "a" * 50_000]),
        ("speaker", ["x", -1, 1.5, True, None, 2, 10**30]),
        ("temperature", [math.nan, -0.1, 2.1, math.inf, "hot", True]),
        ("topk", [0, -1, 1.5, "many", True, math.nan]),
        ("seed", [2**63, -(2**63) - 1, 1.5, "lucky", True]),
        ("max_audio_length_ms", [0, -5, math.nan, math.inf, "long", True]),
        ("timeout", [-1, math.nan, "soon", True]),
        ("context", ["turns", 7, [1], [None], ["text"], None]),
        ("voice", [7, "", "../secret", "nobody", ["a"]]),
    ],
)
@pytest.mark.parametrize("call", ["stream", "generate"])
def test_bad_values_are_named(tiny_generator: Generator, call: str, param: str, values: list[Any]) -> None:
    for value in values:
        wish = {"text": "Hello.", **SHORT, param: value}
        if (value is None and param in {"speaker", "text", "context"}) or value is not None:
            with pytest.raises(InvalidInputError) as caught:
                getattr(tiny_generator, call)(**wish)
            assert caught.value.param == param, value
            assert len(str(caught.value)) < 300
    assert len(tiny_generator.generate("Hello.", seed=1, **SHORT))


def test_a_context_with_unusable_text(tiny_generator: Generator) -> None:
    with pytest.raises(InvalidInputError) as caught:
        tiny_generator.stream("Hello.", context=[Segment(0, "...", tone(0.2))])
    assert caught.value.param == "context"
    with pytest.raises(InvalidInputError, match="speakers 0, 1") as caught:
        tiny_generator.stream("Hello.", context=[Segment(7, "Hi.", tone(0.2))])
    assert caught.value.param == "context"


def test_numpy_numbers_are_numbers(tiny_generator: Generator) -> None:
    np = pytest.importorskip("numpy")
    wish = {"temperature": np.float32(0.5), "topk": np.int64(7), "seed": np.int64(3)}
    plain = tiny_generator.generate("Hello.", temperature=0.5, topk=7, seed=3, **SHORT)
    assert torch.equal(tiny_generator.generate("Hello.", **wish, **SHORT), plain)


def test_old_turns_leave_and_are_never_encoded(tiny_generator: Generator, prompts: list[Request]) -> None:
    long = torch.full((24_000 * 60,), 0.1)
    context = [Segment(0, "An hour ago.", long), Segment(1, "Just now.", tone(0.2))]
    tiny_generator.generate("Hello.", context=context, seed=1, **SHORT)
    assert text_column(prompts[0].prompt) == ids(tiny_generator, "Just now.", 1) + ids(tiny_generator, "Hello.", 0)
    assert len(tiny_generator._cache) == 1


def test_a_voice_that_does_not_fit_is_told_before_anything_is_spoken(tiny_generator: Generator) -> None:
    voice = Voice("long", (Segment(0, "A very long sample.", tone(60.0)),))
    with pytest.raises(PromptTooLongError) as caught:
        tiny_generator.stream("Hello.", voice=voice)
    assert caught.value.excess > 0


def test_a_voice_by_name_or_value(
    tiny_model: CSM, tiny_codec: Codec, tmp_path: Path, tiny_generator: Generator, prompts: list[Request]
) -> None:
    folder = tmp_path / "anna"
    folder.mkdir()
    write_wav(folder / "sample.wav", tone(0.4), 24_000)
    (folder / "transcript.txt").write_text("This is Anna.", encoding="utf-8")
    tiny_generator._settings = Settings(voices=tmp_path)
    named = tiny_generator.generate("Hello.", speaker=1, voice="anna", seed=1, **SHORT)
    voice = csm_core.voices.VoiceCache(24_000).get("anna", tmp_path)
    assert torch.equal(tiny_generator.generate("Hello.", speaker=1, voice=voice, seed=1, **SHORT), named)
    assert torch.equal(tiny_generator.generate("Hello.", speaker=1, voice=folder, seed=1, **SHORT), named)
    wanted = ids(tiny_generator, "This is Anna.", 1) + ids(
        tiny_generator, "Hello.", 1
    )  # it speaks as the speaker asked for
    assert [text_column(request.prompt) for request in prompts] == [wanted] * 3
    assert not torch.equal(tiny_generator.generate("Hello.", speaker=1, seed=1, **SHORT), named)
    heard = [tiny_generator._voice("anna", speaker)[0].segment for speaker in (0, 1)]
    assert heard[0] is heard[1]  # read once, not for each call


def test_context_audio_is_encoded_once(tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = tiny_generator.codec.encode
    monkeypatch.setattr(tiny_generator.codec, "encode", lambda pcm: encoded.append(len(pcm)) or encode(pcm))
    for _ in range(3):
        tiny_generator.generate(TWO, context=[Segment(0, "Before.", tone(0.3))], seed=1, max_audio_length_ms=6000)
    assert encoded == [7200]


def test_first_sound_after_one_frame(tiny_generator: Generator) -> None:
    with tiny_generator.stream("Hello.", seed=1) as stream:
        sizes = [len(next(stream)) for _ in range(4)]
    assert sizes == [1920 - 120, 2 * 1920, 4 * 1920, 8 * 1920]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("how", ["close", "with", "forget", "cancel"])
def test_an_unfinished_stream_stops_the_engine(tiny_generator: Generator, prompts: list[Request], how: str) -> None:
    stream = tiny_generator.stream("a" * 60, seed=1)
    next(stream)
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    elif how == "forget":
        del stream
        gc.collect()
    else:
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            list(stream)
    assert prompts[0].cancelled
    wait_for(lambda: tiny_generator._engine._scheduler.idle)


def test_cancel_from_another_thread(tiny_generator: Generator) -> None:
    stream = tiny_generator.stream(TWO * 10, seed=1)
    next(stream)
    threading.Timer(0.05, stream.cancel).start()
    with pytest.raises(RequestCancelledError):
        list(stream)


def test_timeout(tiny_generator: Generator) -> None:
    with pytest.raises(RequestTimeoutError):
        tiny_generator.generate(TWO * 20, seed=1, timeout=0.2)
    assert len(tiny_generator.generate("Hello.", seed=1, timeout=600, **SHORT))


def test_callers_on_many_threads_get_what_they_asked_for(tiny_generator: Generator) -> None:
    wanted = {seed: tiny_generator.generate(TWO, seed=seed, max_audio_length_ms=5000) for seed in range(3)}
    got: dict[int, torch.Tensor] = {}

    def call(seed: int) -> None:
        got[seed] = tiny_generator.generate(TWO, seed=seed, max_audio_length_ms=5000)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], wanted[seed]) for seed in wanted)


def test_a_full_queue_is_told(tiny_model: CSM, tiny_codec: Codec) -> None:
    tokenizer = TextTokenizer(character_tokenizer(" abcdefghijklmnopqrstuvwxyz[]0123456789."), 0, 1)
    settings = Settings(engine=EngineConfig(queue_size=0))
    with Generator(tiny_model, tiny_codec, tokenizer, Profile("tiny"), settings) as generator:
        stream = generator.stream("a" * 200, seed=1)
        next(stream)
        with pytest.raises(EngineBusyError):
            generator.generate("Hello.")
        stream.close()


def test_close_ends_those_who_listen(tiny_generator: Generator) -> None:
    stream = tiny_generator.stream(TWO * 20, seed=1)
    next(stream)
    tiny_generator.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        tiny_generator.generate("Hello.")
    assert not tiny_generator.alive


def test_load_a_native_checkpoint(
    tiny_checkpoint: Path, tiny_generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "csm_core"), load(str(tiny_checkpoint), device="cpu") as generator:
        assert (generator.model_name, generator.sample_rate, generator.device) == ("tiny", 24_000, "cpu")
        speech = generator.speak(TWO, seed=1)
    wanted = tiny_generator.speak(TWO, seed=1)
    assert torch.equal(speech.codes, wanted.codes)
    torch.testing.assert_close(speech.audio, wanted.audio, rtol=0, atol=1e-6)
    lines = [record.getMessage() for record in caplog.records if record.name == "csm_core.generator"]
    assert len(lines) == 1
    assert lines[0].startswith("loaded tiny")
    assert "cpu (as asked)" in lines[0]
    assert not any("Hello" in record.getMessage() for record in caplog.records)


def test_a_small_model_on_the_cpu_runs_on_one_thread(tiny_checkpoint: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load(str(tiny_checkpoint), device="cpu").close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("key", "value"), [("defaults", {"pitch": 2}), ("codec", {"dim": 16})])
def test_load_a_checkpoint_of_another_version(tiny_checkpoint: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, key: value}), "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(str(folder), device="cpu")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == best
    for device in ("toaster", "cuda:99", "meta", 7.5):
        with pytest.raises(InvalidInputError) as caught:
            pick_device(device)  # type: ignore[arg-type]
        assert caught.value.param == "device"
