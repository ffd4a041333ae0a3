"""Slots: the cached step is the plain model, rows do not touch each other, and only real codes come out."""

import dataclasses
import math

import pytest
import torch

from csm_core.codec import Codec
from csm_core.config import ModelConfig
from csm_core.engine.request import Event, Request, SamplingParams
from csm_core.engine.runner import BROKEN, Runner
from csm_core.engine.sampling import gumbel, sample
from csm_core.engine.scheduler import Frame
from csm_core.model.csm import ABSENT, CSM


def ignore(event: Event) -> None:
    pass


def request(seed: int, length: int = 6, **params: float) -> Request:
    """A prompt of text frames around two audio frames, its tokens from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.full((length, 3), ABSENT)
    prompt[:, -1] = torch.randint(2, 64, (length,), generator=generator)
    if length > 4:
        prompt[1:3, :2] = torch.randint(0, 61, (2, 2), generator=generator)
        prompt[1:3, -1] = ABSENT
    return Request(prompt, SamplingParams(seed=seed, **params), ignore)  # type: ignore[arg-type]


def run(runner: Runner, slot: int, wish: Request, frames: int) -> list[Frame]:
    runner.prefill(slot, wish)
    return [runner.step([slot])[0] for _ in range(frames)]


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 7}, {"temperature": 1.3, "top_k": 10_000}]
)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_step_is_the_plain_model(tiny_model: CSM, tiny_codec: Codec, params: dict[str, float], length: int) -> None:
    """No cache, no slots: the whole sequence again for each frame, then the same draw."""
    wish = request(3, length, **params)
    frames, codes = wish.prompt[None], []
    for number in range(8):
        hidden = tiny_model.forward_backbone(frames)[:, -1]
        noise = gumbel(torch.tensor([3]), torch.tensor([number]), 2, 61)

        def pick(logits: torch.Tensor, k: int, noise: torch.Tensor = noise, number: int = number) -> torch.Tensor:
            logits = logits[:, :61].clone()
            if k == 0 and number < wish.params.min_frames:
                logits[:, 0] = -math.inf
            heat, top_k = torch.tensor([wish.params.temperature]), torch.tensor([min(wish.params.top_k, 61)])
            return sample(logits, noise[:, k], heat, top_k, 61)

        frame = tiny_model.decode_frame(hidden, pick)
        codes.append(tuple(frame[0].tolist()))
        frames = torch.cat([frames, torch.nn.functional.pad(frame, (0, 1), value=ABSENT)[None]], dim=1)
    assert run(Runner(tiny_model, tiny_codec, 1), 0, wish, 8) == codes
    assert len(set(codes)) > 1


def test_codes_do_not_depend_on_slot_or_neighbours(tiny_model: CSM, tiny_codec: Codec) -> None:
    wishes = [request(seed, length=5 + 40 * seed, temperature=0.5 + seed / 4, top_k=5 + 20 * seed) for seed in range(3)]
    alone = [run(Runner(tiny_model, tiny_codec, 1), 0, wish, 12) for wish in wishes]
    runner = Runner(tiny_model, tiny_codec, 3)
    got: list[list[Frame]] = [[], [], []]
    runner.prefill(2, wishes[0])
    for _ in range(5):
        got[0] += runner.step([2])
    runner.prefill(0, wishes[1])
    for _ in range(4):
        for index, frame in zip((1, 0), runner.step([0, 2]), strict=True):
            got[index].append(frame)
    runner.prefill(1, wishes[2])
    for _ in range(3):
        for index, frame in zip((1, 2, 0), runner.step([0, 1, 2]), strict=True):
            got[index].append(frame)
    for mine, theirs in zip(got, alone, strict=True):
        assert mine == theirs[: len(mine)]


def test_a_slot_remembers_nothing(tiny_model: CSM, tiny_codec: Codec) -> None:
    first, second = request(1, length=60), request(2, length=7)
    fresh = Runner(tiny_model, tiny_codec, 1)
    wanted = run(fresh, 0, second, 6)
    sound = fresh.decode({0: wanted})[0]
    used = Runner(tiny_model, tiny_codec, 1)
    used.decode({0: run(used, 0, first, 20)})
    assert run(used, 0, second, 6) == wanted
    assert torch.equal(used.decode({0: wanted})[0], sound)


class Eager(CSM):
    """Wants code 0, then the codes that the codec has not, above all others."""

    def codebook0_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().codebook0_logits(hidden)
        logits[..., 61:] += 1000.0
        logits[..., 0] += 500.0
        return logits


@pytest.fixture
def eager(tiny_model_config: ModelConfig) -> CSM:
    torch.manual_seed(0)
    model = Eager(tiny_model_config).eval().requires_grad_(False)
    model.audio_head[..., 61:] = 0.0
    return model


def test_only_codes_of_the_codec(eager: CSM, tiny_codec: Codec) -> None:
    frames = run(Runner(eager, tiny_codec, 1), 0, request(0, min_frames=0, temperature=2.0, top_k=1000), 40)
    assert all(0 <= code < 61 for frame in frames for code in frame)
    assert {frame[0] for frame in frames} == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_end_is_banned_at_the_start(eager: CSM, tiny_codec: Codec, temperature: float) -> None:
    frames = run(Runner(eager, tiny_codec, 1), 0, request(0, min_frames=5, temperature=temperature), 8)
    assert [frame[0] != 0 for frame in frames] == [True] * 5 + [False] * 3


def test_a_broken_row_is_told_and_leaves_nothing_behind(tiny_model_config: ModelConfig, tiny_codec: Codec) -> None:
    torch.manual_seed(0)
    model = CSM(tiny_model_config).eval().requires_grad_(False)
    model.text_embedding.weight[63] = math.nan
    runner = Runner(model, tiny_codec, 2)
    bad, good = request(1, length=60), request(2)  # NaN in positions that the good one will not overwrite
    bad.prompt[0, -1], good.prompt[:, -1] = 63, good.prompt[:, -1].clamp(max=62)
    wanted = run(Runner(model, tiny_codec, 1), 0, good, 3)
    runner.prefill(0, bad)
    runner.prefill(1, good)
    frames = runner.step([0, 1])
    assert frames == [(BROKEN, BROKEN), wanted[0]]
    assert run(runner, 0, good, 3) == wanted


def test_decode_serves_chunks_of_different_lengths(tiny_model: CSM, tiny_codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randint(0, 61, (12, 2), generator=generator) for _ in range(3)]
    runner = Runner(tiny_model, tiny_codec, 3)
    for slot in range(3):
        runner.prefill(slot, request(slot))
    heard: list[list[torch.Tensor]] = [[], [], []]
    cuts = [(4, 4, 4), (1, 4, 7), (2, 2, 8)]
    done = [0, 0, 0]
    for turn in range(3):
        chunks = {s: [tuple(f) for f in streams[s][done[s] : done[s] + cuts[s][turn]].tolist()] for s in range(3)}
        for slot, pcm in runner.decode(chunks).items():
            heard[slot].append(pcm)
            done[slot] += len(chunks[slot])
    for slot in range(3):
        torch.testing.assert_close(torch.cat(heard[slot]), tiny_codec.decode(streams[slot]), rtol=0, atol=1e-5)
    assert runner.decode({}) == {}


def test_the_window_can_be_filled(tiny_model_config: ModelConfig, tiny_codec: Codec) -> None:
    torch.manual_seed(0)
    model = CSM(dataclasses.replace(tiny_model_config, max_seq_len=20)).eval().requires_grad_(False)
    assert len(run(Runner(model, tiny_codec, 1), 0, request(1, length=20), 1)) == 1
    assert len(run(Runner(model, tiny_codec, 1), 0, request(1, length=10), 11)) == 11
