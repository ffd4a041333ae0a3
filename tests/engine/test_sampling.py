"""The noise is uniform and independent in every coordinate; drawing follows softmax, top-k and temperature."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csm_core.engine.sampling import Draw, gumbel, mix, sample


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def drawn(
    logits: torch.Tensor, noise: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, limit: int
) -> torch.Tensor:
    """As the runner draws: without noise where the temperature is 0."""
    limit = min(limit, logits.shape[-1])
    return sample(logits, noise * (temperature > 0).unsqueeze(1), Draw.of(temperature, top_k, limit), limit)


def draw(logits: torch.Tensor, count: int, temperature: float = 1.0, top_k: int = 1000, seed: int = 0) -> torch.Tensor:
    """``count`` draws from one row of logits: one a frame."""
    noise = gumbel(torch.full((count,), seed), torch.arange(count), 1, len(logits))[:, 0]
    heat, k = torch.full((count,), temperature), torch.full((count,), top_k)
    return drawn(logits.expand(count, -1), noise, heat, k, top_k)


def lowbias32(x: int) -> int:
    """The C original in Python's integers, with its own constants."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@given(st.integers(0, 2**32 - 1))
def test_mix_is_lowbias32(x: int) -> None:
    assert mix(ints(x)).item() == lowbias32(x)


def test_mix_loses_nothing() -> None:
    x = torch.arange(2**20) * 4093 % 2**32  # distinct
    assert len(mix(x).unique()) == len(x)


def test_noise_is_gumbel() -> None:
    noise = gumbel(ints(1, 2, 3, -4), ints(0, 1, 2, 3), 8, 2048).double().flatten()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.03)
    counts = torch.histc(torch.exp(-torch.exp(-noise)), bins=64, min=0, max=1)  # through its own distribution function
    expected = len(noise) / 64
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert 63 - 5 * math.sqrt(126) < chi2 < 63 + 5 * math.sqrt(126)


def test_noise_reaches_far_up() -> None:
    """2**22 draws of a 24-bit uniform would end at 16.6 and repeat; the largest of so many Gumbels is near 15.2."""
    noise = gumbel(torch.arange(64), torch.zeros(64, dtype=torch.int64), 16, 4096)
    assert 13 < noise.max() < 23
    top = noise.flatten().topk(1000).values
    assert len(top.unique()) > 990


@pytest.mark.parametrize(
    ("seeds", "frames"),
    [
        ((0, 1), (0, 0)),
        ((0, -1), (5, 5)),
        ((7, 7 + 2**32), (0, 0)),
        ((0, 0), (0, 1)),
        ((3, 3), (100, 356)),
        ((1, 0), (0, 1)),
    ],
)
def test_seeds_and_frames_are_independent(seeds: tuple[int, int], frames: tuple[int, int]) -> None:
    first, second = gumbel(ints(*seeds), ints(*frames), 32, 2048).flatten(1)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(len(first))
    assert (first == second).float().mean() < 1e-3


@pytest.mark.parametrize("axis", ["codebook", "entry", "frame"])
def test_neighbours_in_every_coordinate_are_independent(axis: str) -> None:
    noise = gumbel(torch.full((64,), 11), torch.arange(64), 16, 128)  # [frame, codebook, entry]
    at = ["frame", "codebook", "entry"].index(axis)
    for lag in (1, 2, 3, 7):
        a = noise.narrow(at, 0, noise.shape[at] - lag).flatten()
        b = noise.narrow(at, lag, noise.shape[at] - lag).flatten()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(len(a)), lag


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [3, 5, 12])
def test_draws_follow_softmax(temperature: float, top_k: int) -> None:
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    count = 40_000
    kept = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    expected = (kept / temperature).softmax(0)
    seen = torch.bincount(draw(logits, count, temperature, top_k), minlength=12) / count
    assert (seen[expected == 0] == 0).all()
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected).abs() <= 4.5 * sigma).all()


def test_temperature_zero_and_top_1_are_argmax() -> None:
    logits = torch.randn(100, 33)
    noise = gumbel(torch.arange(100), torch.zeros(100, dtype=torch.int64), 1, 33)[:, 0]
    best = logits.argmax(-1)
    ones, many = torch.ones(100, dtype=torch.int64), torch.full((100,), 33)
    assert torch.equal(drawn(logits, noise, torch.zeros(100), many, 33), best)
    assert torch.equal(drawn(logits, noise, torch.full((100,), 5.0), ones, 33), best)


def test_rows_have_their_own_settings() -> None:
    logits = torch.randn(1, 50).expand(4, -1)
    noise = gumbel(ints(9, 9, 9, 9), ints(0, 0, 0, 0), 1, 50)[:, 0]
    heat, k = torch.tensor([0.0, 1.0, 1.0, 2.0]), ints(50, 1, 7, 50)
    together = drawn(logits, noise, heat, k, 50)
    alone = [drawn(logits[:1], noise[:1], heat[i : i + 1], k[i : i + 1], int(k[i])) for i in range(4)]
    assert together.tolist() == [code.item() for code in alone]


def test_a_row_does_not_depend_on_its_place() -> None:
    """Bit for bit: vectorised loops treat the last elements of a tensor apart."""
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    seeds, frames, logits = torch.arange(37) * 2**40, torch.arange(37) % 5, torch.randn(37, 53)
    heat, k = torch.rand(37) + 0.1, torch.arange(37) + 1
    noise = gumbel(seeds, frames, 3, 53)
    assert torch.equal(gumbel(seeds[order], frames[order], 3, 53), noise[order])
    assert torch.equal(gumbel(seeds[20:21], frames[20:21], 3, 53), noise[20:21])
    codes = drawn(logits, noise[:, 1], heat, k, 53)
    assert torch.equal(drawn(logits[order], noise[order, 1], heat[order], k[order], 53), codes[order])


def test_banned_entries_are_never_drawn() -> None:
    logits = torch.zeros(8)
    logits[[2, 5]] = -math.inf
    assert set(draw(logits, 2000).tolist()) == {0, 1, 3, 4, 6, 7}
    only = torch.full((8,), -math.inf)
    only[3] = -100.0
    assert set(draw(only, 2000).tolist()) == {3}
