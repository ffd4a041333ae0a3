"""A small language with the shape of the teacher's shards: a letter is one phone, codes follow phones."""

from pathlib import Path

import numpy as np

from csm_core.train.data import CELLS, FRAME, PHONES

LETTERS = "abdefghiklmnoprstuvwz"
WORDS = ["band", "milk", "root", "sun", "dog", "late", "wave", "hope", "zone", "gift"]


def sentence(row: int) -> str:
    rng = np.random.default_rng(row)
    return " ".join(rng.choice(WORDS, int(rng.integers(1, 4)))) + "."


def cells(text: str) -> np.ndarray:
    spoken = [0, 0, *(1 + LETTERS.index(c) for c in text if c in LETTERS for _ in range(1)), 0]
    return np.array([*spoken, *([0] * (len(spoken) % CELLS))], dtype=np.uint8)


def write_audio(folder: Path, shard: int, count: int) -> None:
    """A tone per phone, locked to the frame."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = range(shard * count, (shard + 1) * count)
    labels = [cells(sentence(row)) for row in rows]
    time = np.arange(FRAME // CELLS) / 24_000
    tones = [np.sin(2 * np.pi * 25 * (4 + p) * time) * (p > 0) * 8000 for p in range(len(PHONES))]
    audio = [np.concatenate([tones[p] for p in label]).astype(np.int16) for label in labels]
    save(
        folder / f"{shard:05d}.npz", rows, labels, audio=np.concatenate(audio), ends=np.cumsum([len(a) for a in audio])
    )


def write_codes(folder: Path, shard: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = range(shard * count, (shard + 1) * count)
    labels = [cells(sentence(row)) for row in rows]
    codes, characters = [], []
    for row, label in zip(rows, labels, strict=True):
        pairs = label.reshape(-1, CELLS).astype(int)
        codes.append(
            np.stack([1 + pairs[:, 0] * 22 + pairs[:, 1], 1 + pairs[:, 0], 1 + pairs[:, 1]], axis=1).astype(np.uint16)
        )
        where = [0, 0, *(i for i, c in enumerate(sentence(row)) if c in LETTERS)]
        characters.append(np.array([*where, *([len(sentence(row)) - 1] * (len(label) - len(where)))], dtype=np.float32))
    save(
        folder / f"{shard:05d}.npz",
        rows,
        labels,
        codes=np.concatenate(codes),
        ends=np.cumsum([len(c) for c in codes]),
        characters=np.concatenate(characters).reshape(-1, CELLS),
    )


def save(file: Path, rows: range, labels: list[np.ndarray], **arrays: np.ndarray) -> None:
    speakers = np.array([row % 2 for row in rows])
    np.savez(file, rows=np.array(rows), speakers=speakers, labels=np.concatenate(labels).reshape(-1, CELLS), **arrays)


def write_sentences(file: Path, count: int) -> None:
    file.write_text("\n".join(sentence(row) for row in range(count)) + "\n")
