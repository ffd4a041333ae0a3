"""Uploads of voices: what becomes of good ones, and why others are refused. The speech is the bundled voice's."""

import math

import pytest
import torch
import torchaudio.functional as AF

import csm_core
from csm_core.audio.sample import prepare_sample
from csm_core.errors import InvalidInputError

RATE = 24_000


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    torch.set_num_threads(1)
    with csm_core.load("bundled", device="cpu") as generator:
        return generator.generate("We had a long talk about the price of food.", seed=3)


def noise(seconds: float, level: float) -> torch.Tensor:
    return level * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))


def time_of(seconds: float) -> torch.Tensor:
    return torch.arange(round(seconds * RATE)) / RATE


def decibels(pcm: torch.Tensor) -> float:
    return float(20 * pcm.square().mean().sqrt().log10())


@pytest.mark.parametrize("gain", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("room", [0.0, 1e-4])
def test_a_good_sample_is_trimmed_and_levelled(speech: torch.Tensor, gain: float, room: float) -> None:
    alone = prepare_sample(speech, RATE)
    recorded = torch.cat([noise(2.0, room), speech * gain, noise(1.0, room)])
    sample = prepare_sample(recorded, RATE)
    assert abs(len(sample) - len(alone)) < 0.5 * RATE
    assert len(sample) < len(recorded) - 2 * RATE
    assert decibels(sample) == pytest.approx(-20.5, abs=2.5)  # -20 where there is speech; a little less with its pauses
    assert sample.abs().max() <= 0.951


def test_peaks_limit_the_level(speech: torch.Tensor) -> None:
    peaky = speech * 0.1
    peaky[len(peaky) // 2] = 1.0
    assert prepare_sample(peaky, RATE).abs().max() == pytest.approx(0.95, abs=1e-3)


def test_noise_of_a_room_is_no_reason_to_refuse(speech: torch.Tensor) -> None:
    noisy = speech + noise(len(speech) / RATE, 0.3 * float(speech.square().mean().sqrt()))  # 10 dB
    assert len(prepare_sample(noisy, RATE)) > RATE


def clipped(speech: torch.Tensor) -> torch.Tensor:
    return (speech / speech.abs().max() * 4).clamp(-1, 1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda _: torch.zeros(0), "is silent"),
        (lambda _: torch.zeros(2 * RATE), "is silent"),
        (lambda _: noise(2.0, 1e-4), "is silent"),
        (lambda _: torch.full((2 * RATE,), math.nan), "is silent"),
        (lambda speech: speech[: RATE // 4], r"at least 1 s"),
        (lambda speech: speech.repeat(30), "at most 30 s"),
        (clipped, "is distorted"),
        (lambda speech: AF.resample(clipped(speech), RATE, 16_000), "is distorted"),
        (lambda _: noise(4.0, 0.1), "no speech"),
        (lambda _: noise(4.0, 0.1) * (time_of(4.0) % 0.4 < 0.2) * time_of(4.0), "no speech"),
        (lambda _: 0.3 * torch.sin(2 * math.pi * 50 * time_of(4.0)) + noise(4.0, 0.1), "no speech"),
        (
            lambda _: (
                sum(torch.sin(2 * math.pi * f * time_of(4.0)) for f in (220, 277, 330))
                * torch.exp(-6 * (time_of(4.0) % 0.5))
                * 0.2
            ),
            "no speech",
        ),
    ],
    ids="nothing zeros whisper nan short long clipped clipped-resampled noise bursts hum chords".split(),
)
def test_what_cannot_be_a_voice_is_refused_with_the_reason(speech: torch.Tensor, make, why: str) -> None:
    with pytest.raises(InvalidInputError, match=why) as caught:
        prepare_sample(make(speech), RATE)
    assert caught.value.param == "audio_sample"


def test_the_limits_are_the_callers(speech: torch.Tensor) -> None:
    seconds = len(prepare_sample(speech, RATE)) / RATE
    prepare_sample(speech, RATE, max_seconds=seconds)
    with pytest.raises(InvalidInputError, match="at most"):
        prepare_sample(speech, RATE, max_seconds=seconds - 0.01)
    with pytest.raises(InvalidInputError, match="at least"):
        prepare_sample(speech, RATE, min_seconds=seconds + 0.01)
