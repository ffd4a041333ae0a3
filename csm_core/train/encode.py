"""The teacher's shards as the language model trains on them: codes, phones and the character that each frame speaks.

    python -m csm_core.train.encode --audio runs/voice/audio --sentences runs/voice/sentences.txt \\
        --codec runs/voice/codec.pt --out runs/voice/codes

The first run retires code 0 of every codebook (the least used entry takes its place) and writes the codec that all
codes belong to, ``codec.safetensors`` in the output folder: so the all-zero frame that ends a segment is never speech.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from moshi.models.compression import MimiModel
from safetensors.torch import load_file, save_file

from csm_core.codec import build_mimi
from csm_core.config import BUNDLED_CODEC
from csm_core.train.align import character_indices, characters_of_cells, learn, runs
from csm_core.train.data import CELLS, FRAME, Array, Utterance, shards, utterances, written_whole

BATCH_FRAMES = 1200  # padded frames in one pass of the encoder


def retire_code_zero(mimi: MimiModel) -> None:
    """Swap entry 0 of every codebook with its least used one."""
    quantizer = mimi.quantizer
    for layer in [*quantizer.rvq_first.vq.layers, *quantizer.rvq_rest.vq.layers]:
        codebook = layer._codebook
        rare = int(codebook.cluster_usage.argmin())
        for buffer in (codebook.cluster_usage, codebook.embedding_sum):
            buffer[[0, rare]] = buffer[[rare, 0]]


@torch.inference_mode()
def encode(mimi: MimiModel, spoken: list[Utterance]) -> Iterator[Array]:
    """Codes ``[frames, K]`` of each utterance in the given order; batched by length, for the model is causal."""
    order = sorted(range(len(spoken)), key=lambda i: len(spoken[i].labels))
    codes: dict[int, Array] = {}
    while order:
        longest = len(spoken[order[-1]].labels)
        count = max(1, BATCH_FRAMES // longest)
        batch, order = order[-count:], order[:-count]
        wave = torch.zeros(len(batch), 1, longest * FRAME)
        for row, index in enumerate(batch):
            audio = torch.from_numpy(spoken[index].audio.astype(np.float32)) / 32768
            wave[row, 0, : len(audio)] = audio
        for index, found in zip(batch, mimi.encode(wave), strict=True):
            codes[index] = found.T[: len(spoken[index].labels)].numpy().astype(np.uint16)
    return (codes[i] for i in range(len(spoken)))


def codec_for(folder: Path, trained: Path) -> MimiModel:
    """The codec of the folder's codes, made from the trained one on the first call."""
    mimi = build_mimi(BUNDLED_CODEC)
    file = folder / "codec.safetensors"
    if not file.exists():
        mimi.load_state_dict(torch.load(trained, weights_only=True)["mimi"])
        retire_code_zero(mimi)
        save_file({name: tensor.contiguous() for name, tensor in mimi.state_dict().items()}, file)
    mimi.load_state_dict(load_file(file))
    return mimi.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.sentences.read_text().splitlines()
    mimi = codec_for(args.out, args.codec)

    table_file = args.out / "letters.npy"
    if not table_file.exists():
        some = list(utterances(shards(args.audio)[0]))
        np.save(
            table_file,
            learn([character_indices(lines[u.row]) for u in some], [runs(u.labels.ravel())[0] for u in some]),
        )
    table = np.load(table_file)

    for shard in shards(args.audio):
        file = args.out / shard.name
        if file.exists():
            continue
        spoken = list(utterances(shard))
        codes = list(encode(mimi, spoken))
        where = [characters_of_cells(table, character_indices(lines[u.row]), u.labels.ravel()) for u in spoken]
        with written_whole(file) as handle:
            np.savez(
                handle,
                codes=np.concatenate(codes),
                ends=np.cumsum([len(c) for c in codes]),
                labels=np.concatenate([u.labels for u in spoken]),
                characters=np.concatenate([w.reshape(-1, CELLS) for w in where]),
                rows=np.array([u.row for u in spoken]),
                speakers=np.array([u.speaker for u in spoken]),
            )
        print(f"{file.name}: {len(spoken)} utterances, {sum(map(len, codes))} frames", flush=True)


if __name__ == "__main__":
    main()
