"""Takes with a real engine whose codec is made silent: how many are made, with what, and who hears what."""

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from csm_core.codec import Codec, DecodeStream
from csm_core.config import Profile, Settings, SilenceConfig
from csm_core.engine.request import Chunk
from csm_core.errors import SilentOutputError
from csm_core.generator import Generator
from csm_core.model.csm import CSM
from csm_core.streaming_decoder import Record
from csm_core.takes import FADE, Listener, levels
from csm_core.text import TextTokenizer, character_tokenizer

ALPHABET = " abcdefghijklmnopqrstuvwxyz[]0123456789.,"
WINDOW = 480


class MutedStream(DecodeStream):
    """Decodes as ever, then multiplies what it made by ``codec.gain(take, frame)``."""

    codec: "MutedCodec"
    take = -1
    frame = 0

    def reset(self, slot: int) -> None:  # the runner does this once for every request, so for every take
        super().reset(slot)
        self.take += 1
        self.frame = 0

    def push(self, codes: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        sound = super().push(codes, active).view(codes.shape[1], -1)
        gains = [self.codec.gain(self.take, self.frame + n) for n in range(len(sound))]
        self.frame += len(sound)
        return (sound * torch.tensor(gains)[:, None]).view(1, -1)


class MutedCodec(Codec):
    """A real codec of which the test decides, frame by frame, whether it can be heard."""

    gain: Callable[[int, int], float] = staticmethod(lambda take, frame: 1.0)

    def stream(self, slots: int = 1, fast: bool = True, record: Record | None = None) -> MutedStream:
        stream = MutedStream(self._rows(slots, fast, record), slots, self._check)
        stream.codec = self
        return stream


@pytest.fixture
def codec(tiny_codec: Codec, tiny_codec_state: dict[str, torch.Tensor]) -> MutedCodec:
    return MutedCodec(tiny_codec.config, tiny_codec_state)


@pytest.fixture
def generator(tiny_model: CSM, codec: MutedCodec) -> Iterator[Generator]:
    tokenizer = TextTokenizer(character_tokenizer(ALPHABET), 0, 1)
    with Generator(tiny_model, codec, tokenizer, Profile("muted", temperature=0.9, top_k=50)) as generator:
        yield generator


def is_silent(pcm: torch.Tensor) -> bool:
    return bool(pcm.abs().max() == 0)


@pytest.mark.parametrize("residue", [0.0, 1e-4], ids=["digital silence", "noise below the threshold"])
@pytest.mark.parametrize("silent_takes", [0, 1, 2])
def test_n_silent_takes_make_n_plus_1(
    generator: Generator, codec: MutedCodec, silent_takes: int, residue: float
) -> None:
    codec.gain = lambda take, frame: residue if take < silent_takes else 1.0
    speech = generator.speak("hello", seed=5, max_audio_length_ms=1600)
    assert [(take.temperature, take.top_k) for take in speech.takes] == [(0.9, 50), (0.7, 25), (0.5, 12)][
        : silent_takes + 1
    ]
    assert [take.number for take in speech.takes] == list(range(silent_takes + 1))
    assert len({take.seed for take in speech.takes}) == silent_takes + 1
    assert speech.takes[0].seed == speech.seed == 5
    assert min(levels(speech.audio[:WINDOW][None])) > -50


@pytest.mark.parametrize(("temperature", "topk"), [(0.0, 50), (0.9, 1), (0.0, 1)])
@pytest.mark.parametrize("silent_takes", [1, 2])
def test_a_greedy_take_is_not_repeated(
    generator: Generator, codec: MutedCodec, silent_takes: int, temperature: float, topk: int
) -> None:
    """Argmax knows no seed: what was silent at temperature 0 or top-k 1 would be silent again."""
    codec.gain = lambda take, frame: 0.0 if take < silent_takes else 1.0
    speech = generator.speak("hello", seed=5, max_audio_length_ms=1600, temperature=temperature, topk=topk)
    assert [take.number for take in speech.takes] == list(range(silent_takes + 1))
    assert speech.takes[0].temperature == temperature
    assert all(take.temperature >= 0.3 and take.top_k >= 5 for take in speech.takes[1:])
    codec.gain = lambda take, frame: 1.0
    alone = [
        generator.speak("hello", seed=take.seed, max_audio_length_ms=1600, temperature=take.temperature,
                        topk=take.top_k).codes for take in speech.takes
    ]  # fmt: skip
    assert torch.equal(alone[-1], speech.codes)
    assert len({tuple(codes.flatten().tolist()) for codes in alone}) == silent_takes + 1  # each drew differently


@pytest.mark.parametrize("silent_takes", [1, 2])
def test_streaming_lets_nothing_silent_through(generator: Generator, codec: MutedCodec, silent_takes: int) -> None:
    codec.gain = lambda take, frame: 0.0 if take < silent_takes else 1.0
    stream = generator.stream("hello", seed=5, max_audio_length_ms=1600)
    first = next(stream)
    assert len(stream.takes) == silent_takes + 1
    assert stream.finish_reason is None
    rest = list(stream)
    assert not any(is_silent(chunk) for chunk in [first, *rest])
    assert stream.finish_reason == "length"
    again = generator.speak("hello", seed=stream.takes[-1].seed, temperature=stream.takes[-1].temperature,
                            topk=stream.takes[-1].top_k, max_audio_length_ms=1600)  # fmt: skip
    assert torch.equal(torch.cat([first, *rest]), again.audio)  # the last take, whole, and nothing of the others


@pytest.mark.parametrize("call", ["generate", "speak", "generate_codes", "stream"])
def test_only_silence_is_an_error(generator: Generator, codec: MutedCodec, call: str) -> None:
    codec.gain = lambda take, frame: 0.0
    with pytest.raises(SilentOutputError, match="3 takes"):
        list(getattr(generator, call)("hello", seed=5, max_audio_length_ms=800))
    codec.gain = lambda take, frame: 1.0
    assert len(generator.generate("hello", seed=5, max_audio_length_ms=800))


def test_a_silent_start_is_given_up_early(generator: Generator, codec: MutedCodec) -> None:
    pushed = []

    def gain(take: int, frame: int) -> float:
        pushed.append(frame)
        return 0.0

    codec.gain = gain
    with pytest.raises(SilentOutputError):
        generator.generate("hello " * 20, seed=5, max_audio_length_ms=16_000)
    assert max(pushed) < 100  # 2.5 s are 32 of the 200 frames; what was made before the cancel came is on top


def test_an_empty_take_is_retried(generator: Generator, codec: MutedCodec) -> None:
    """A click of one window is not speech either."""
    codec.gain = lambda take, frame: 1.0 if take == 1 or frame == 3 else 0.0
    config = SilenceConfig(onset_ms=100)
    generator._settings = Settings(silence=config)
    speech = generator.speak("hello", seed=5, max_audio_length_ms=1600)
    assert len(speech.takes) == 2


def test_the_lead_is_trimmed(generator: Generator, codec: MutedCodec) -> None:
    codec.gain = lambda take, frame: 0.0 if frame < 10 else 1.0
    speech = generator.speak("hello", seed=5, max_audio_length_ms=2400)
    whole = codec.decode(speech.codes)
    assert len(speech.audio) == (30 - 10) * 1920 + 5 * WINDOW  # 100 ms of it stay
    assert len(speech.codes) == 22  # the frames that these 5 windows lie in, and the 20 that sound
    assert is_silent(speech.audio[: 5 * WINDOW])
    assert not is_silent(speech.audio[5 * WINDOW : 6 * WINDOW])
    assert len(whole) >= len(speech.audio)


def test_an_endless_tail_stops_and_is_trimmed(generator: Generator, codec: MutedCodec) -> None:
    codec.gain = lambda take, frame: 1.0 if frame < 10 else 0.0
    speech = generator.speak("hello to all of you", seed=5)
    assert speech.finish_reason == "silence"
    assert len(speech.takes) == 1
    assert len(speech.audio) == 10 * 1920 + 25 * WINDOW  # 500 ms of it stay
    assert len(speech.codes) == 17


def test_a_tail_of_silence_at_the_end_is_trimmed_too(generator: Generator, codec: MutedCodec) -> None:
    codec.gain = lambda take, frame: 1.0 if frame < 10 else 0.0
    speech = generator.speak("hello", seed=5, max_audio_length_ms=2000)
    assert speech.finish_reason == "length"
    assert len(speech.audio) == 10 * 1920 + 25 * WINDOW


def test_a_pause_stays_as_long_as_it_was(generator: Generator, codec: MutedCodec) -> None:
    codec.gain = lambda take, frame: 0.0 if 10 <= frame < 30 else 1.0
    audio = torch.cat(list(generator.stream("hello to all of you", seed=5, max_audio_length_ms=4000)))
    assert len(audio) == 50 * 1920
    assert is_silent(audio[10 * 1920 : 30 * 1920])
    assert not is_silent(audio[30 * 1920 : 31 * 1920])


def hear(gains: Sequence[float], config: SilenceConfig | None = None) -> tuple[Listener, torch.Tensor]:
    """A listener fed with a tone of 440 Hz, one frame for each gain."""
    listener = Listener(config or SilenceConfig(), 24_000)
    tone = 0.5 * torch.sin(torch.arange(len(gains) * 1920) * 2 * math.pi * 440 / 24_000 + 1.0).view(-1, 1920)
    passed = []
    for index, gain in enumerate(gains):
        sound = listener.hear(Chunk(torch.tensor([[index + 1, 0]]), tone[index] * gain))
        passed += [] if sound is None else [sound]
        if listener.verdict is not None:
            break
    return listener, torch.cat(passed) if passed else torch.zeros(0)


def test_edges_do_not_click() -> None:
    listener, passed = hear([0.0015] * 5 + [1.0] * 5)  # the lead is below the threshold, but not nothing
    listener.end("length")
    audio = torch.cat([passed, listener.last_sound()])
    inner = 2 * math.pi * 440 / 24_000 * 0.5  # the steepest step of the tone itself
    assert abs(audio[0]) < 1e-4
    assert abs(audio[-1]) < inner
    assert audio[-2000:].diff().abs().max() <= 1.1 * inner
    assert len(audio) == 5 * 1920 + 5 * WINDOW


def test_what_starts_with_sound_is_untouched() -> None:
    listener, passed = hear([1.0] * 4)
    assert passed[0] == pytest.approx(0.5 * math.sin(1.0), abs=1e-6)
    assert len(passed) == 4 * 1920 - FADE
    assert listener.codes().tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]]


def test_levels_ignore_an_offset() -> None:
    tone = torch.sin(torch.arange(480) * 2 * math.pi / 48)
    told = levels(torch.stack([tone, tone * 0.1 + 0.7, torch.full((480,), 0.9), torch.zeros(480)]))
    assert told[:2] == pytest.approx([-3.01, -23.01], abs=0.05)
    assert max(told[2:]) < -100
