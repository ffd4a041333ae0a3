"""The teacher's shards: the grid they are on, whole utterances, and crops of whole frames. Knows no model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

SAMPLE_RATE = 24_000
FRAME = 1920  # samples: 80 ms
CELLS = 2  # in a frame; every phone lasts a whole number of cells
PHONES = """pau aa ae ah ao aw ax axr ay b ch d dh dx eh el em en er ey f g hh ih iy jh k l m n ng nx ow oy p r s sh t
th uh uw v w y z zh""".split()


@dataclass(frozen=True)
class Utterance:
    """One line as the teacher spoke it. ``audio`` int16 ``[frames * FRAME]``, ``labels`` uint8 ``[frames, CELLS]``."""

    row: int
    speaker: int
    audio: Array
    labels: Array


@contextmanager
def written_whole(file: Path) -> Iterator[BinaryIO]:
    """A handle to write ``file`` through: it appears under its name when it is complete, or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as handle:
        yield handle
    partial.replace(file)


def shards(folder: Path) -> list[Path]:
    """The finished shards in order."""
    return sorted(folder.glob("*.npz"))


def utterances(shard: Path) -> Iterator[Utterance]:
    with np.load(shard) as data:
        audio, ends, labels = data["audio"], data["ends"], data["labels"].reshape(-1, CELLS)
        starts = np.concatenate([[0], ends[:-1]])
        for row, speaker, start, end in zip(data["rows"], data["speakers"], starts, ends, strict=True):
            yield Utterance(int(row), int(speaker), audio[start:end], labels[start // FRAME : end // FRAME])


class Crops:
    """Random crops of ``frames`` whole frames over all utterances of the shards, as batches for the codec."""

    def __init__(self, files: list[Path], frames: int) -> None:
        kept = [u for file in files for u in utterances(file) if len(u.labels) >= frames]
        self.audio = [u.audio for u in kept]
        self.labels = [u.labels for u in kept]
        self.frames = frames
        lengths = np.array([len(labels) for labels in self.labels], dtype=float)
        self.weights = lengths / lengths.sum()

    def batch(self, size: int, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw number ``draw``: audio float32 ``[size, 1, frames * FRAME]``, labels int64 ``[size, frames, CELLS]``."""
        random = np.random.default_rng([draw < 0, abs(draw)])
        audio, labels = [], []
        for index in random.choice(len(self.audio), size, p=self.weights):
            start = int(random.integers(0, len(self.labels[index]) - self.frames + 1))
            audio.append(self.audio[index][start * FRAME : (start + self.frames) * FRAME])
            labels.append(self.labels[index][start : start + self.frames])
        wave = torch.from_numpy(np.stack(audio)).float().div(32768).unsqueeze(1)
        return wave, torch.from_numpy(np.stack(labels)).long()
