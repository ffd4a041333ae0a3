"""Which character does a frame speak? Letters and phones of one sentence aligned monotonically, for guided attention.

The table P(phone | letter) is learnt from the sentences themselves: start on the diagonal, align, count, again
(hard expectation maximisation of a monotone alignment). Knows no audio and no model.
"""

from collections.abc import Sequence

import numpy as np

from csm_core.train.data import PHONES, Array

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'-,.?!"
SMOOTHING = 0.3  # counts added to every pair


def character_indices(text: str) -> Array:
    """The sentence in CHARACTERS, lower case; everything else counts as a space."""
    return np.array([max(0, CHARACTERS.find(c)) for c in text.lower()])


def runs(labels: Array) -> tuple[Array, Array]:
    """Phones of a sentence and, for every cell, the number of its phone. Equal neighbours count as one phone."""
    change = np.concatenate([[True], labels[1:] != labels[:-1]])
    return labels[change], np.cumsum(change) - 1


def best_path(cost: Array) -> list[tuple[int, int]]:
    """Cheapest monotone path through ``cost`` [characters, phones], corner to corner, by single steps."""
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(rows):
        # A step to the right inside the row makes row minima depend on each other: plain loop.
        above, row = total[i], total[i + 1]
        diagonal = np.minimum(above[:-1], above[1:])
        for j in range(columns):
            row[j + 1] = cost[i, j] + min(diagonal[j], row[j])
    path, i, j = [], rows, columns
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        steps = ((total[i - 1, j - 1], i - 1, j - 1), (total[i - 1, j], i - 1, j), (total[i, j - 1], i, j - 1))
        _, i, j = min(steps)
    return path[::-1]


def learn(texts: Sequence[Array], phones: Sequence[Array], rounds: int = 4) -> Array:
    """Cost table -log P(phone | character), ``[len(CHARACTERS), len(PHONES)]``."""
    table = np.zeros((len(CHARACTERS), len(PHONES)))
    for step in range(rounds):
        counts = np.full(table.shape, SMOOTHING)
        for text, spoken in zip(texts, phones, strict=True):
            if step == 0:
                columns = np.minimum(np.arange(len(text)) * len(spoken) // len(text), len(spoken) - 1)
                np.add.at(counts, (text, spoken[columns]), 1.0)
            else:
                for i, j in best_path(table[text][:, spoken]):
                    counts[text[i], spoken[j]] += 1.0
        table = -np.log(counts / counts.sum(axis=1, keepdims=True))
    return table


def characters_of_cells(table: Array, text: Array, labels: Array) -> Array:
    """The (mean) character position that each cell speaks, float32 ``[cells]``."""
    phones, phone_of_cell = runs(labels)
    sums, hits = np.zeros(len(phones)), np.zeros(len(phones))
    for i, j in best_path(table[text][:, phones]):
        sums[j] += i
        hits[j] += 1
    found: Array = (sums / np.maximum(hits, 1))[phone_of_cell].astype(np.float32)
    return found
