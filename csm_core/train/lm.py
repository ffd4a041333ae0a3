"""Train the bundled language model on the teacher's codes: the served network, its own frame layout, one scroll.

Two helps are for training only and leave the served graph alone: an attention head is guided to the character that is
being spoken (learnt in 200 steps instead of thousands), and a linear head reads the phones off the backbone.
Checkpoints hold everything; the same command continues. New shards are picked up while it runs.

    python -m csm_core.train.lm --codes runs/voice/codes --sentences runs/voice/sentences.txt --out runs/voice/lm.pt
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm_core.config import BUNDLED_CODEC, ModelConfig, StackConfig
from csm_core.model.csm import ABSENT, CSM
from csm_core.text import TextTokenizer, character_tokenizer
from csm_core.train.align import CHARACTERS
from csm_core.train.data import CELLS, PHONES, Array, shards, written_whole

ALPHABET = CHARACTERS + "[]0123456789"
TAG = 4  # [BOS] "[0]": positions before the sentence's first character
GUIDED_LAYERS = (1, 2)  # head 0 of these
GUIDE_WIDTH = 1.5  # characters
HELD_OUT_SHARD = 0
EMA_DECAY = 0.998


def bundled_config(num_codebooks: int) -> ModelConfig:
    tokenizer = character_tokenizer(ALPHABET)
    return ModelConfig(
        backbone=StackConfig(layers=5, dim=256, heads=4, kv_heads=4, head_dim=64, ffn_dim=704),
        depth=StackConfig(layers=2, dim=160, heads=4, kv_heads=4, head_dim=40, ffn_dim=448),
        num_codebooks=num_codebooks,
        codebook_size=BUNDLED_CODEC.codebook_size,
        audio_vocab_size=BUNDLED_CODEC.codebook_size,
        text_vocab_size=tokenizer.get_vocab_size(),
        max_seq_len=512,
        bos_id=tokenizer.token_to_id("[BOS]"),
        eos_id=tokenizer.token_to_id("[EOS]"),
        rope_theta=10_000.0,
        rope_scaling=None,
    )


@dataclass(frozen=True)
class Example:
    """One spoken sentence. ``codes`` [T, K]; ``phones`` and ``characters`` [T, CELLS] say what each frame speaks."""

    text: list[int]
    codes: Array
    phones: Array
    characters: Array

    def __len__(self) -> int:
        return len(self.text) + len(self.codes) + 1  # and the end frame


def examples(shard: Path, lines: list[str], tokenizer: TextTokenizer, num_codebooks: int) -> Iterator[Example]:
    with np.load(shard) as data:
        codes, labels, characters = data["codes"], data["labels"], data["characters"]
        starts = np.concatenate([[0], data["ends"][:-1]])
        for row, speaker, start, end in zip(data["rows"], data["speakers"], starts, data["ends"], strict=True):
            yield Example(
                tokenizer.encode(lines[row], int(speaker)),
                codes[start:end, :num_codebooks].astype(np.int64),
                labels[start:end].astype(np.int64),
                characters[start:end],
            )


@dataclass
class Batch:
    """Rows of whole segments, padded on the right. Targets stand at the position that predicts them.

    frames [B, T, K+1]; where [N] flat positions that predict a frame; codes [N, K]; phones [N, CELLS] (-100 at the
    end); target [N] the column of the character being spoken (-1 at the end).
    """

    frames: Tensor
    where: Tensor
    codes: Tensor
    phones: Tensor
    target: Tensor


def corrupted(codes: Array, size: int, rng: np.random.Generator) -> Array:
    """Codes as a model might have got them wrong: 8 % of frames from elsewhere in the sentence, 4 % of codes random."""
    out = codes.copy()
    frames = rng.random(len(codes)) < 0.08
    out[frames] = codes[rng.integers(0, len(codes), int(frames.sum()))]
    single = rng.random(codes.shape) < 0.04
    out[single] = rng.integers(0, size, int(single.sum()))
    return out


def assemble(rows: list[list[Example]], config: ModelConfig, rng: np.random.Generator) -> Batch:
    count = config.num_codebooks
    length = max(sum(map(len, row)) for row in rows)
    frames = np.full((len(rows), length, count + 1), ABSENT, dtype=np.int64)
    where, codes, phones, target = [], [], [], []
    for index, row in enumerate(rows):
        at = 0
        for example in row:
            text, spoken = len(example.text), len(example.codes)
            frames[index, at : at + text, count] = example.text
            first = at + text
            frames[index, first : first + spoken, :count] = corrupted(example.codes, config.codebook_size, rng)
            frames[index, first + spoken, :count] = 0
            where.append(index * length + first - 1 + np.arange(spoken + 1))
            codes.append(np.concatenate([example.codes, np.zeros((1, count), np.int64)]))
            phones.append(np.concatenate([example.phones, np.full((1, CELLS), -100)]))
            target.append(np.concatenate([at + TAG + example.characters.mean(axis=1), [-1.0]]))
            at += len(example)
    return Batch(
        torch.from_numpy(frames),
        torch.from_numpy(np.concatenate(where)),
        torch.from_numpy(np.concatenate(codes)),
        torch.from_numpy(np.concatenate(phones)),
        torch.from_numpy(np.concatenate(target).astype(np.float32)),
    )


def draw(pool: list[Example], config: ModelConfig, tokens: int, progress: float, rng: np.random.Generator) -> Batch:
    """Half the batches hold lone sentences, half conversations of two to five; the shortest sentences come first."""
    reach = len(pool) if progress > 0.08 else int(len(pool) * (0.3 + 0.7 * progress / 0.08))
    if rng.random() < 0.5:
        size = 8 * tokens // 64  # drawn, then a window of similar lengths: little padding
        drawn = sorted((pool[i] for i in rng.integers(0, reach, size)), key=len)
        start = int(rng.integers(0, max(1, size - size // 8)))
        rows: list[list[Example]] = []
        for example in drawn[start:]:
            if rows and (len(rows) + 1) * len(example) > tokens:
                break
            rows.append([example])
        return assemble(rows, config, rng)
    segments = int(rng.integers(2, 6))
    rows = []
    while True:
        row: list[Example] = []
        for i in rng.integers(0, reach, segments):
            if sum(map(len, row)) + len(pool[i]) <= config.max_seq_len:
                row.append(pool[i])
        longest = max(sum(map(len, r)) for r in [*rows, row])
        if rows and longest * (len(rows) + 1) > tokens:
            return assemble(rows, config, rng)
        rows.append(row)


class Trainee(nn.Module):
    """The served model plus the heads that only training has."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.csm = CSM(config)
        self.phones = nn.Linear(config.backbone.dim, CELLS * len(PHONES))

    def losses(self, batch: Batch, depth_share: float) -> dict[str, Tensor]:
        csm, guided = self.csm, {}
        length = batch.frames.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=batch.frames.device).triu(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Causal attention written out: the guided heads' scores are needed, and forward and backward of 30 rows of
            # 64 positions take 10 ms in bf16 on one core where torch's fused kernel takes 31.
            scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(later, float("-inf"))
            if layer in GUIDED_LAYERS:
                guided[layer] = scores[:, 0]
            return scores.softmax(-1).type_as(v) @ v

        positions = torch.arange(length, device=batch.frames.device).unsqueeze(0)
        hidden = csm.backbone(csm.embed(batch.frames), positions, attend)
        hidden = hidden.flatten(0, 1)[batch.where]
        first = csm.codebook0_logits(hidden).float()
        ends = batch.target < 0
        kept = ends | (torch.rand(len(ends), device=ends.device) < depth_share)
        rest = csm.depth_logits(hidden[kept], batch.codes[kept]).float()
        phones = self.phones(hidden).float().view(-1, len(PHONES))
        by_codebook = F.cross_entropy(rest.transpose(1, 2), batch.codes[kept][:, 1:], reduction="none").mean(0)
        return {
            "c0": F.cross_entropy(first, batch.codes[:, 0]),
            "depth": by_codebook.mean(),
            "phone": F.cross_entropy(phones, batch.phones.flatten()),
            "guide": torch.stack([guide(batch, guided[layer]) for layer in GUIDED_LAYERS]).mean(),
            "accuracy": (first.argmax(-1) == batch.codes[:, 0]).float().mean(),
            "phone_accuracy": (phones.argmax(-1) == batch.phones.flatten())[batch.phones.flatten() >= 0].float().mean(),
        }


def guide(batch: Batch, scores: Tensor) -> Tensor:
    """-log of the attention mass near the character being spoken, over the positions that predict speech.

    ``scores`` [B, T, T] of one head before its softmax.
    """
    speaking = batch.target >= 0
    near = torch.arange(batch.frames.shape[1], device=scores.device) - batch.target[speaking].unsqueeze(1)
    weights = scores.flatten(0, 1)[batch.where[speaking]].float().softmax(-1)
    return -torch.log((weights * torch.exp(-(near**2) / (2 * GUIDE_WIDTH**2))).sum(-1) + 1e-6).mean()


@torch.no_grad()
def follow(average: CSM, csm: CSM, step: int) -> None:
    """Exponential moving average of the weights; short at first."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for kept, new in zip(average.parameters(), csm.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


@torch.no_grad()
def validate(trainee: Trainee, average: CSM, held_out: list[Example], config: ModelConfig) -> str:
    """Held-out losses of the averaged weights on lone sentences, without corruption noise in the score's draw."""
    rng, csm = np.random.default_rng(0), trainee.csm
    trainee.csm = average
    sums: dict[str, float] = {}
    rows = [[e] for e in sorted(held_out[:96], key=len)]
    for start in range(0, len(rows), 24):
        with torch.autocast("cpu", torch.bfloat16):
            losses = trainee.losses(assemble(rows[start : start + 24], config, rng), 1.0)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) / (len(rows) / 24)
    trainee.csm = csm
    return " ".join(f"{name} {value:.3f}" for name, value in sums.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codebooks", type=int, default=5, help="how many of the codec's codebooks to speak")
    parser.add_argument("--steps", type=int, default=8000, help="length of the learning-rate schedule")
    parser.add_argument(
        "--stop", type=int, default=None, help="save and stop at this step; continue with the same command"
    )
    parser.add_argument("--tokens", type=int, default=2000, help="positions in a batch, padding included")
    parser.add_argument("--lr", type=float, default=1.8e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)

    config = bundled_config(args.codebooks)
    tokenizer = TextTokenizer(character_tokenizer(ALPHABET), config.bos_id, config.eos_id)
    lines = args.sentences.read_text().splitlines()
    trainee = Trainee(config)
    average = CSM(config)
    average.load_state_dict(trainee.csm.state_dict())
    decayed = [p for p in trainee.parameters() if p.ndim > 1]
    plain = [p for p in trainee.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    step = 0
    if args.out.exists():
        saved = torch.load(args.out, weights_only=True)
        trainee.load_state_dict(saved["trainee"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]

    read: set[Path] = set()
    pool: list[Example] = []
    held_out: list[Example] = []
    print(f"{sum(p.numel() for p in trainee.csm.parameters()) / 1e6:.2f} M parameters, from step {step}", flush=True)
    sums: dict[str, float] = {}
    began, tokens = time.time(), 0
    stop = args.steps if args.stop is None else min(args.steps, args.stop)
    while step < stop:
        # Every draw follows from the step alone: a run that was interrupted continues as if it had not been.
        rng = np.random.default_rng([1, step])
        torch.manual_seed(step)
        if step % 200 == 0 or not pool:  # new shards may have come
            for shard in [s for s in shards(args.codes) if s not in read]:
                found = list(examples(shard, lines, tokenizer, config.num_codebooks))
                if shard.stem == f"{HELD_OUT_SHARD:05d}":
                    held_out, found = found[:100], found[100:]
                pool.extend(found)
                read.add(shard)
            pool.sort(key=len)
        rate = args.lr * min(1.0, (step + 1) / 60) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = draw(pool, config, args.tokens, step / args.steps, rng)
        with torch.autocast("cpu", torch.bfloat16):
            losses = trainee.losses(batch, depth_share=0.25)
        loss = losses["c0"] + losses["depth"] + 0.5 * losses["phone"] + 0.3 * losses["guide"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        step += 1
        follow(average, trainee.csm, step)
        tokens += batch.frames.shape[0] * batch.frames.shape[1]
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / 50
        if step % 50 == 0:
            spent = time.time() - began
            shown = " ".join(f"{name} {value:.3f}" for name, value in sums.items())
            print(
                f"step {step} {shown} {50 / spent:.2f} steps/s {tokens / spent:.0f} tokens/s {len(pool)} examples",
                flush=True,
            )
            sums, began, tokens = {}, time.time(), 0
        if step % 250 == 0 or step == stop:
            print(f"step {step} held out: {validate(trainee, average, held_out, config)}", flush=True)
            state = {
                "trainee": trainee.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            with written_whole(args.out) as handle:
                torch.save(state, handle)
            began = time.time()


if __name__ == "__main__":
    main()
