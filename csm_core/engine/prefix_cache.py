"""What was read of earlier prompts: the longest known beginning of a new one need not be read again.

Segments (of a voice, of a conversation) are kept one by one, each under the digest of everything up to its end, so that
contexts that begin alike share what they share. Knows no slots and no model; keys and values come and go as tensors.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from csm_core.engine.scheduler import Mark
from csm_core.model.csm import ABSENT
from csm_core.model.kv_cache import Prefix


def find_marks(prompt: Tensor) -> tuple[Mark, ...]:
    """Where the segments of ``prompt`` int64 [T, K+1] end: each after its EOS frame, K zeros and no text.

    The prompt's last frame does not count, for it is not read but left to the first step. The digests have 128 bits:
    two prompts that differ and are taken for one are not to be expected.
    """
    closing = (prompt[:-1, :-1] == 0).all(dim=1) & (prompt[:-1, -1] == ABSENT)
    running, marks = blake2b(digest_size=16), []
    for start, end in pairwise([0, *(closing.nonzero().flatten() + 1).tolist()]):
        running.update(prompt[start:end].numpy().tobytes())
        marks.append(Mark(end, running.digest()))
    return tuple(marks)


class PrefixCache:
    """Keys and values of segments within ``budget`` bytes; those that were not needed for longest go first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._segments: OrderedDict[bytes, Prefix] = OrderedDict()  # least recently used first

    def known(self, marks: Sequence[Mark]) -> Sequence[Mark]:
        """Those at the beginning whose segments are here."""
        return list(takewhile(lambda mark: mark.digest in self._segments, marks))

    def get(self, marks: Sequence[Mark]) -> Prefix:
        """Keys and values of known segments, one after the other."""
        self._touch(marks)
        parts = [self._segments[mark.digest] for mark in marks]
        return Prefix(torch.cat([part.keys for part in parts], 2), torch.cat([part.values for part in parts], 2))

    def add(self, marks: Sequence[Mark], prefix: Prefix) -> None:
        """Keep what is new of a context; ``prefix`` holds all of it. What exceeds the budget goes, oldest first."""
        borders = pairwise([0, *(mark.end for mark in marks)])
        for mark, (start, end) in zip(marks, borders, strict=True):
            if mark.digest not in self._segments:
                segment = Prefix(prefix.keys[:, :, start:end].clone(), prefix.values[:, :, start:end].clone())
                self._segments[mark.digest] = segment
                self.nbytes += segment.nbytes
        self._touch(marks)
        while self.nbytes > self.budget:
            _, oldest = self._segments.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        self._segments.clear()
        self.nbytes = 0

    def _touch(self, marks: Sequence[Mark]) -> None:
        """The last segment first: each is younger than those that build on it, and goes after them."""
        for mark in reversed(marks):
            self._segments.move_to_end(mark.digest)
