"""Where to cut speech: long audio into pieces at its quietest moments, and words into passages at their pauses."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from csm_core.asr.transcript import Passage

QUIET_SECONDS = 0.2  # a cut lies in the middle of the quietest stretch of that length
SILENCE_PEAK = 1e-3  # -60 dBFS
SILENCE_SHARE = 0.01  # of the loudest
PAUSE_SECONDS = 0.5  # between two words: a new passage
PASSAGE_SECONDS = 8.0  # no subtitle stays longer


@dataclass(frozen=True)
class Word:
    """Times in seconds from the start of the audio."""

    text: str
    start: float
    end: float


def split_at_pauses(pcm: torch.Tensor, sample_rate: int, max_seconds: float) -> list[tuple[int, int]]:
    """Borders (start, stop), in samples, of pieces of PCM ``[samples]``: all of it, each ``max_seconds`` at most.

    A piece ends at the quietest moment of its second half.
    """
    longest, quiet = round(max_seconds * sample_rate), round(QUIET_SECONDS * sample_rate)
    borders = [0]
    while len(pcm) - borders[-1] > longest:
        middle, latest = borders[-1] + longest // 2, borders[-1] + longest
        loudness = pcm[middle:latest].square().unfold(0, quiet, quiet // 4).sum(dim=1)
        borders.append(middle + int(loudness.argmin()) * (quiet // 4) + quiet // 2)
    return list(zip(borders, [*borders[1:], len(pcm)], strict=True))


def without_silence(pcm: torch.Tensor, sample_rate: int) -> tuple[int, int]:
    """Where in PCM ``[samples]`` the sound begins and ends (start, stop); (0, 0) where there is none."""
    size = sample_rate // 50
    peaks = pcm[: len(pcm) // size * size].abs().view(-1, size).amax(dim=1)
    if not len(peaks):
        return 0, 0
    loud = (peaks > max(SILENCE_PEAK, SILENCE_SHARE * float(peaks.max()))).nonzero().flatten().tolist()
    return (loud[0] * size, (loud[-1] + 1) * size) if loud else (0, 0)


def passages(words: Iterable[Word]) -> tuple[Passage, ...]:
    """Words in the order of time -> passages that begin after a pause, or when one has become too long."""
    groups: list[list[Word]] = []
    for word in words:
        group = groups[-1] if groups else None
        if group and word.start - group[-1].end < PAUSE_SECONDS and word.end - group[0].start <= PASSAGE_SECONDS:
            group.append(word)
        else:
            groups.append([word])
    return tuple(Passage(g[0].start, g[-1].end, " ".join(word.text for word in g)) for g in groups)
