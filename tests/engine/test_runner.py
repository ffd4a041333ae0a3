"""Slots: the cached step is the plain model, rows do not touch each other, and only real codes come out."""

import dataclasses
import math
import random

import pytest
import torch

from csm_core.codec import Codec
from csm_core.config import EngineConfig, ModelConfig
from csm_core.engine.request import Event, Request, SamplingParams
from csm_core.engine.runner import BROKEN, UNREAD, Runner
from csm_core.engine.sampling import Draw, gumbel, sample
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


def prefill(runner: Runner, slot: int, wish: Request, piece: int = 1000) -> None:
    runner.begin(slot, wish)
    read(runner, slot, wish, 0, piece)


def read(runner: Runner, slot: int, wish: Request, start: int, piece: int = 1000) -> None:
    for first in range(start, len(wish.prompt) - 1, piece):
        runner.prefill(slot, wish.prompt, first, min(first + piece, len(wish.prompt) - 1))
    runner.ready(slot, wish.prompt)


def run(runner: Runner, slot: int, wish: Request, frames: int) -> list[Frame]:
    prefill(runner, slot, wish)
    return [runner.step([slot]).frames()[0] for _ in range(frames)]


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
            if wish.params.temperature == 0:
                return logits.argmax(-1)
            draw = Draw.of(torch.tensor([wish.params.temperature]), torch.tensor([min(wish.params.top_k, 61)]), 61)
            return sample(logits, noise[:, k], draw, 61)

        frame = tiny_model.decode_frame(hidden, pick)
        codes.append(tuple(frame[0].tolist()))
        frames = torch.cat([frames, torch.nn.functional.pad(frame, (0, 1), value=ABSENT)[None]], dim=1)
    assert run(Runner(tiny_model, tiny_codec, EngineConfig(slots=1)), 0, wish, 8) == codes
    assert len(set(codes)) > 1


def test_codes_do_not_depend_on_slot_or_neighbours(tiny_model: CSM, tiny_codec: Codec) -> None:
    wishes = [request(seed, length=5 + 40 * seed, temperature=0.5 + seed / 4, top_k=5 + 20 * seed) for seed in range(3)]
    alone = [run(Runner(tiny_model, tiny_codec, EngineConfig(slots=1)), 0, wish, 12) for wish in wishes]
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=3))
    got: list[list[Frame]] = [[], [], []]
    prefill(runner, 2, wishes[0])
    for _ in range(5):
        got[0] += runner.step([2]).frames()
    prefill(runner, 0, wishes[1])
    for _ in range(4):
        for index, frame in zip((1, 0), runner.step([0, 2]).frames(), strict=True):
            got[index].append(frame)
    prefill(runner, 1, wishes[2])
    for _ in range(3):
        for index, frame in zip((1, 2, 0), runner.step([0, 1, 2]).frames(), strict=True):
            got[index].append(frame)
    for mine, theirs in zip(got, alone, strict=True):
        assert mine == theirs[: len(mine)]


def test_a_slot_remembers_nothing(tiny_model: CSM, tiny_codec: Codec) -> None:
    first, second = request(1, length=60), request(2, length=7)
    fresh = Runner(tiny_model, tiny_codec, EngineConfig(slots=1))
    wanted = run(fresh, 0, second, 6)
    sound = fresh.decode({0: wanted})[0]
    used = Runner(tiny_model, tiny_codec, EngineConfig(slots=1))
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
    frames = run(
        Runner(eager, tiny_codec, EngineConfig(slots=1)), 0, request(0, min_frames=0, temperature=2.0, top_k=1000), 40
    )
    assert all(0 <= code < 61 for frame in frames for code in frame)
    assert {frame[0] for frame in frames} == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_end_is_banned_at_the_start(eager: CSM, tiny_codec: Codec, temperature: float) -> None:
    frames = run(
        Runner(eager, tiny_codec, EngineConfig(slots=1)), 0, request(0, min_frames=5, temperature=temperature), 8
    )
    assert [frame[0] != 0 for frame in frames] == [True] * 5 + [False] * 3


def test_a_broken_row_is_told_and_leaves_nothing_behind(tiny_model_config: ModelConfig, tiny_codec: Codec) -> None:
    torch.manual_seed(0)
    model = CSM(tiny_model_config).eval().requires_grad_(False)
    model.text_embedding.weight[63] = math.nan
    runner = Runner(model, tiny_codec, EngineConfig(slots=2))
    bad, good = request(1, length=60), request(2)  # NaN in positions that the good one will not overwrite
    bad.prompt[0, -1], good.prompt[:, -1] = 63, good.prompt[:, -1].clamp(max=62)
    wanted = run(Runner(model, tiny_codec, EngineConfig(slots=1)), 0, good, 3)
    prefill(runner, 0, bad)
    prefill(runner, 1, good)
    frames = runner.step([0, 1]).frames()
    assert frames == [(BROKEN, BROKEN), wanted[0]]
    assert run(runner, 0, good, 3) == wanted


def test_decode_serves_chunks_of_different_lengths(tiny_model: CSM, tiny_codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randint(0, 61, (12, 2), generator=generator) for _ in range(3)]
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=5))
    for slot in range(3):
        prefill(runner, slot, request(slot))
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
    assert len(run(Runner(model, tiny_codec, EngineConfig(slots=1)), 0, request(1, length=20), 1)) == 1
    assert len(run(Runner(model, tiny_codec, EngineConfig(slots=1)), 0, request(1, length=10), 11)) == 11


def test_noise_decides_no_tie_of_a_greedy_row(tiny_model_config: ModelConfig, tiny_codec: Codec) -> None:
    """Whether its neighbour draws or not."""
    model = CSM(tiny_model_config).eval().requires_grad_(False)
    model.codebook0_head.weight.zero_()
    model.audio_head.zero_()
    runner = Runner(model, tiny_codec, EngineConfig(slots=2))
    prefill(runner, 0, request(0, temperature=0.0, min_frames=0))
    prefill(runner, 1, request(1, temperature=1.0, min_frames=0))
    assert runner.step([0, 1]).frames()[0] == runner.step([0]).frames()[0] == (0, 0)


# ---- what a step does to slots that have no part in it: nothing


class Solo:
    """One request by itself in the last slot of eight, so in the bucket of eight: its codes, and what it read."""

    def __init__(self, model: CSM, codec: Codec, wish: Request, frames: int) -> None:
        runner = Runner(model, codec, EngineConfig(slots=8))
        prefill(runner, 7, wish, piece=32)
        self.codes = [runner.step([7]).frames()[0] for _ in range(frames)]
        self.read = runner.save_prefix(7, len(wish.prompt) - 1 + frames)


@pytest.fixture(scope="module")
def solos(tiny_model: CSM, tiny_codec: Codec) -> list[tuple[Request, Solo]]:
    torch.set_num_threads(1)
    wishes = [request(n, length=3 + 31 * n, temperature=n % 3 / 2, top_k=[5, 20, 61][n % 3]) for n in range(6)]
    return [(wish, Solo(tiny_model, tiny_codec, wish, 6 + n)) for n, wish in enumerate(wishes)]


@pytest.mark.parametrize("seed", range(8))
def test_neighbours_slots_and_idle_rows_change_no_bit(
    tiny_model: CSM, tiny_codec: Codec, solos: list[tuple[Request, Solo]], seed: int
) -> None:
    """Requests come and go on random slots while others are half read; slot 7 keeps every step in the bucket of eight.

    Codes and keys and values are compared bit for bit.
    """
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=8))
    chance, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    for tensor in (runner._cache.keys, runner._cache.values):  # what earlier requests left
        tensor.copy_(torch.randn(tensor.shape, generator=noise) * 5)
    runner._position.copy_(torch.randint(0, 512, (8,), generator=noise))
    prefill(runner, 7, request(50, length=20))
    waiting = chance.sample(range(len(solos)), len(solos))
    half_read: dict[int, tuple[int, int]] = {}  # slot: which request, and how far
    running: dict[int, int] = {}
    heard: dict[int, list[Frame]] = {n: [] for n in waiting}
    while waiting or half_read or running:
        free = sorted(set(range(7)) - set(half_read) - set(running))
        if waiting and free and chance.random() < 0.5:
            slot = chance.choice(free)
            half_read[slot] = (waiting.pop(), 0)
            runner.begin(slot, solos[half_read[slot][0]][0])
        for slot, (n, start) in list(half_read.items()):
            wish, stop = solos[n][0], min(start + 32, len(solos[n][0].prompt) - 1)
            runner.prefill(slot, wish.prompt, start, stop)
            half_read[slot] = (n, stop)
            if stop == len(wish.prompt) - 1:
                runner.ready(slot, wish.prompt)
                running[slot] = half_read.pop(slot)[0]
        # Any of those who can speak, and always the one that keeps the bucket.
        slots = sorted({slot for slot in running if chance.random() < 0.7} | {7})
        for slot, frame in zip(slots, runner.step(slots).frames(), strict=True):
            if slot in running:
                heard[running[slot]].append(frame)
        for slot, n in list(running.items()):
            wish, solo = solos[n]
            if len(heard[n]) == len(solo.codes):
                kept = runner.save_prefix(slot, solo.read.keys.shape[2])
                assert heard[n] == solo.codes
                assert torch.equal(kept.keys, solo.read.keys)
                assert torch.equal(kept.values, solo.read.values)
                del running[slot]


def test_an_idle_row_full_of_nan_harms_nobody(tiny_model: CSM, tiny_codec: Codec) -> None:
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=4))
    runner._cache.keys[:, 1:3] = math.nan
    runner._cache.values[:, 1:3] = math.nan
    wishes = [request(5, length=30), request(6, length=50)]
    wanted = [run(Runner(tiny_model, tiny_codec, EngineConfig(slots=1)), 0, wish, 8) for wish in wishes]
    prefill(runner, 3, wishes[0])
    heard = [[], []]
    heard[0] += runner.step([3]).frames()
    runner.begin(2, wishes[1])  # its row was NaN and its neighbour's is; what the scratch rows hold is NaN as well
    heard[0] += runner.step([3]).frames()
    read(runner, 2, wishes[1], 0, piece=20)
    for _ in range(6):
        for which, frame in zip((1, 0), runner.step([2, 3]).frames(), strict=True):
            heard[which].append(frame)
    assert heard == [wanted[0], wanted[1][:6]]


def test_steps_may_be_launched_before_the_last_is_read(tiny_model: CSM, tiny_codec: Codec) -> None:
    wish = request(4)
    wanted = run(Runner(tiny_model, tiny_codec, EngineConfig(slots=1)), 0, wish, UNREAD)
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=1))
    prefill(runner, 0, wish)
    steps = [runner.step([0]) for _ in range(UNREAD)]
    assert [step.frames()[0] for step in steps] == wanted
    assert steps[0].frames() == [wanted[0]]


def test_a_step_beyond_the_window_stays_in_its_row(tiny_model_config: ModelConfig, tiny_codec: Codec) -> None:
    """With lookahead a request is stepped once more before its end is known."""
    torch.manual_seed(0)
    model = CSM(dataclasses.replace(tiny_model_config, max_seq_len=20)).eval().requires_grad_(False)
    runner = Runner(model, tiny_codec, EngineConfig(slots=2))
    first, second = request(1, length=18), request(2, length=5)
    wanted = run(Runner(model, tiny_codec, EngineConfig(slots=2)), 1, second, 8)
    prefill(runner, 0, first)
    prefill(runner, 1, second)
    assert [runner.step([0, 1]).frames()[1] for _ in range(8)] == wanted


# ---- prompts


def test_a_prompt_may_be_read_in_pieces(tiny_model: CSM, tiny_codec: Codec) -> None:
    wish = request(7, length=100)
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=2))
    wanted = run(Runner(tiny_model, tiny_codec, EngineConfig(slots=1)), 0, wish, 6)
    prefill(runner, 1, wish, piece=17)
    assert [runner.step([1]).frames()[0] for _ in range(6)] == wanted


@pytest.mark.parametrize("length", [1, 2, 60, 130, 512])
@pytest.mark.parametrize("piece", [16, 50, 128])
def test_padded_pieces_read_the_same(tiny_model: CSM, tiny_codec: Codec, length: int, piece: int) -> None:
    """Up to the window's end, where the padding has no place of its own."""
    wish = request(8, length=length)
    frames = min(5, 513 - length)
    plain, fixed = (Runner(tiny_model, tiny_codec, EngineConfig(slots=1, graphs=graphs)) for graphs in (False, True))
    fixed._cache.keys.fill_(3.0)
    for runner in (plain, fixed):
        prefill(runner, 0, wish, piece)
    for mine, theirs in zip(
        *(vars(runner.save_prefix(0, length - 1)).values() for runner in (fixed, plain)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert [fixed.step([0]).frames() for _ in range(frames)] == [plain.step([0]).frames() for _ in range(frames)]


@pytest.mark.parametrize("known", [1, 32, 64])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_loaded_prefix_is_as_good_as_a_read_one(tiny_model: CSM, tiny_codec: Codec, known: int, graphs: bool) -> None:
    """Bit for bit, where the rest is read in the same pieces."""
    wish = request(9, length=100)
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=2, graphs=graphs))
    runner.begin(0, wish)
    runner.prefill(0, wish.prompt, 0, known)
    read(runner, 0, wish, known, piece=32)
    prefix = runner.save_prefix(0, 64)
    assert prefix.nbytes == 2 * 2 * 64 * 8 * 4
    whole = runner.save_prefix(0, 99)
    wanted = [runner.step([0]).frames()[0] for _ in range(5)]
    runner.begin(1, wish)
    runner.load_prefix(1, prefix, known)
    runner.step([0])  # the loaded one is idle meanwhile
    read(runner, 1, wish, known, piece=32)
    again = runner.save_prefix(1, 99)
    assert torch.equal(again.keys, whole.keys)
    assert torch.equal(again.values, whole.values)
    assert [runner.step([1]).frames()[0] for _ in range(5)] == wanted


# ---- moves


def test_a_request_that_moves_does_not_notice(tiny_model: CSM, tiny_codec: Codec) -> None:
    wish, other = request(10, length=40), request(11, length=90)
    alone = Runner(tiny_model, tiny_codec, EngineConfig(slots=1))
    wanted = run(alone, 0, wish, 10)
    sound = alone.decode({0: wanted})[0]
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=4))
    prefill(runner, 0, other)
    prefill(runner, 3, wish)
    heard = [runner.step([0, 3]).frames()[1] for _ in range(4)]
    pcm = [runner.decode({3: heard})[3]]
    runner._cache.values[:, 1] = math.nan  # what a broken request left in the slot
    runner.move(3, 1)
    heard += [runner.step([0, 1]).frames()[1] for _ in range(3)]
    runner.move(1, 2)
    heard += [runner.step([0, 2]).frames()[1] for _ in range(3)]
    pcm.append(runner.decode({2: heard[4:]})[2])
    assert heard == wanted
    torch.testing.assert_close(torch.cat(pcm), sound, rtol=0, atol=1e-5)


def test_a_half_read_prompt_moves_too(tiny_model: CSM, tiny_codec: Codec) -> None:
    wish = request(12, length=60)
    wanted = run(Runner(tiny_model, tiny_codec, EngineConfig(slots=1)), 0, wish, 4)
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=3))
    runner.begin(2, wish)
    runner.prefill(2, wish.prompt, 0, 30)
    runner.move(2, 0)
    runner.begin(2, request(13))
    read(runner, 0, wish, 30)
    assert [runner.step([0]).frames()[0] for _ in range(4)] == wanted
