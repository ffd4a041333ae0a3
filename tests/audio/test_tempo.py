"""Speed without pitch: measured on a tone, on beeps with known places, and chunk by chunk."""

import math

import pytest
import torch

from csm_core.audio.tempo import Stretcher
from csm_core.errors import InvalidInputError

RATE = 24_000
SPEEDS = [0.25, 0.5, 0.8, 1.1, 1.5, 2.0, 3.0, 4.0]


def tone(seconds: float, frequency: float = 220.0) -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(round(seconds * RATE)) * (2 * math.pi * frequency / RATE))


def stretched(pcm: torch.Tensor, speed: float, size: int = 1920) -> list[torch.Tensor]:
    stretcher = Stretcher(speed, RATE)
    return [*(stretcher.feed(chunk) for chunk in pcm.split(size)), stretcher.finish()]


@pytest.mark.parametrize("speed", SPEEDS)
def test_the_length_is_exact_and_the_pitch_stays(speed: float) -> None:
    pcm = tone(4.003)
    out = torch.cat(stretched(pcm, speed))
    assert len(out) == round(len(pcm) / speed)
    middle = out[len(out) // 5 : -len(out) // 5]
    power = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs().square()
    peak = int(power.argmax())
    assert peak * RATE / len(middle) == pytest.approx(220, rel=0.01)  # a sixth of a semitone
    around = round(10 * len(middle) / RATE)  # 10 Hz to both sides
    assert power[peak - around : peak + around].sum() / power.sum() > 0.98  # no clicks at the joins
    assert middle.square().mean().sqrt() == pytest.approx(float(pcm.square().mean().sqrt()), rel=0.05)


@pytest.mark.parametrize("speed", SPEEDS)
def test_every_moment_comes_at_its_time_to_the_very_end(speed: float) -> None:
    pcm = torch.zeros(3 * RATE)
    for start in (0.0, 1.3, 2.8):
        pcm[round(start * RATE) : round((start + 0.2) * RATE)] = tone(0.2, 500.0)
    out = torch.cat(stretched(pcm, speed))
    loud = out.abs().unfold(0, 240, 240).amax(dim=1) > 0.1
    heard = loud.nonzero().flatten() * 240 / RATE * speed  # in the time of what went in
    for start in (0.0, 1.3, 2.8):
        beep = heard[(heard > start - 0.1) & (heard < start + 0.3)]
        assert float(beep.min()) == pytest.approx(start, abs=0.08)
        assert float(beep.max()) == pytest.approx(start + 0.2, abs=0.08)


def test_speed_one_passes_the_same_tensors_through() -> None:
    stretcher = Stretcher(1.0, RATE)
    pcm = tone(0.08)
    assert stretcher.feed(pcm) is pcm
    assert len(stretcher.finish()) == 0


@pytest.mark.parametrize("speed", [0.5, 1.25, 4.0])
def test_how_it_is_cut_does_not_matter(speed: float) -> None:
    pcm = tone(1.0) * torch.linspace(0, 1, RATE)
    whole = torch.cat(stretched(pcm, speed, RATE))
    for size in (100, 1920, 7777):
        assert torch.equal(torch.cat(stretched(pcm, speed, size)), whole)


@pytest.mark.parametrize("speed", [0.25, 0.9, 1.25, 4.0])
def test_it_flows(speed: float) -> None:
    parts = stretched(tone(1.6), speed)
    first = next(number for number, part in enumerate(parts) if len(part))
    assert first <= 2  # within 240 ms of speech
    assert len(parts[-1]) * speed < 0.2 * RATE


def test_nothing_and_a_little_are_stretched_too() -> None:
    assert len(Stretcher(2.0, RATE).finish()) == 0
    assert len(torch.cat(stretched(tone(0.01), 0.5))) == 480


@pytest.mark.parametrize("speed", [0.0, 0.24, 4.01, -1.0, math.nan, math.inf])
def test_other_speeds_are_refused(speed: float) -> None:
    with pytest.raises(InvalidInputError, match=r"0\.25 to 4") as caught:
        Stretcher(speed, RATE)
    assert caught.value.param == "speed"
