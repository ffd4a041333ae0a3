"""Speech faster or slower at its own pitch, while it is spoken. Needs PyAV (the extra ``serve``).

FFmpeg's ``atempo`` (waveform similarity overlap-add) does it: it streams, costs about 4 ms per second of speech, and
PyAV brings it along with the encoders. Knows no format and no model.
"""

import math
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
import torch
from av.filter import Graph

from csm_core.errors import InvalidInputError

SPEEDS = (0.25, 4.0)  # of the speech API
_BLOCK_SECONDS = 0.02  # the filter hands out what a whole frame became: small frames come out soon
_TAIL_SECONDS = 0.25  # of silence behind the end push out what the filters still hold: their windows are 46 ms long


class Stretcher:
    """``feed`` PCM chunk after chunk, then ``finish`` once; n samples come out as ``round(n / speed)`` in all.

    At speed 1.0 chunks pass through untouched. For one thread at a time.
    """

    def __init__(self, speed: float, sample_rate: int) -> None:
        """``sample_rate`` in Hz. Raises InvalidInputError for a speed outside 0.25 to 4."""
        low, high = SPEEDS
        if not low <= speed <= high:
            raise InvalidInputError(f"speed must be {low:g} to {high:g}, not {speed:g}.", "speed")
        self._speed = speed
        self._rate = sample_rate
        self._block = round(_BLOCK_SECONDS * sample_rate)
        self._waiting = torch.zeros(0)
        self._taken = self._pushed = self._given = 0  # samples: in, into the filters, out
        self._graph = None if speed == 1.0 else _tempo_graph(speed, sample_rate)

    def feed(self, pcm: torch.Tensor) -> torch.Tensor:
        """``[samples]`` in, what can be said of it by now out (float32, perhaps empty). The first comes with 46 ms."""
        if self._graph is None:
            return pcm
        stretched = self._push(pcm)
        self._taken += len(pcm)
        return self._clip(stretched)

    def finish(self) -> torch.Tensor:
        """The rest, cut to the exact length."""
        if self._graph is None:
            return torch.zeros(0)
        rest = self._push(torch.zeros(round(_TAIL_SECONDS * self._rate * max(1.0, self._speed))))
        return self._clip(rest)

    def _push(self, pcm: torch.Tensor) -> torch.Tensor:
        """Through the filters in blocks of one size, so that the result does not depend on how the caller cuts."""
        assert self._graph is not None
        waiting = torch.cat([self._waiting, pcm.detach().to("cpu", torch.float32)])
        pieces = []
        while len(waiting) >= self._block:
            block, waiting = waiting[: self._block], waiting[self._block :]
            frame = av.AudioFrame.from_ndarray(block.numpy()[None], format="flt", layout="mono")
            frame.sample_rate = self._rate
            frame.time_base = Fraction(1, self._rate)
            frame.pts = self._pushed
            self._pushed += self._block
            self._graph.push(frame)
            pieces += _ready(self._graph)
        self._waiting = waiting.clone()
        return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0)

    def _clip(self, stretched: torch.Tensor) -> torch.Tensor:
        """Never more than the input so far stands for: the padding of the end stays out."""
        kept = stretched[: max(0, round(self._taken / self._speed) - self._given)]
        self._given += len(kept)
        return kept


def _tempo_graph(speed: float, sample_rate: int) -> Graph:
    """Several equal steps for what is beyond a factor of two, where one filter alone would skip samples."""
    steps = max(1, math.ceil(abs(math.log2(speed))))
    graph = Graph()
    source = graph.add_abuffer(format="flt", sample_rate=sample_rate, layout="mono", time_base=Fraction(1, sample_rate))
    filters = [graph.add("atempo", f"{speed ** (1 / steps):.9f}") for _ in range(steps)]
    graph.link_nodes(source, *filters, graph.add("abuffersink")).configure()
    return graph


def _ready(graph: Graph) -> list[npt.NDArray[np.float32]]:
    pieces = []
    while True:
        try:
            pieces.append(graph.pull().to_ndarray()[0])
        except av.BlockingIOError:  # nothing more before the next push
            return pieces
