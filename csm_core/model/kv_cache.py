"""Keys and values of one transformer stack: static tensors, one row per slot.

Allocated once and never grown. Knows no requests and no schedule: the caller says which row and which positions.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from csm_core.config import StackConfig


@dataclass(frozen=True)
class Prefix:
    """The first positions of one row, copied out: ``keys`` and ``values`` [layers, kv_heads, length, head_dim]."""

    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


def write(kept: Tensor, new: Tensor, at: Tensor) -> None:
    """Store ``new`` [B, kv_heads, T, head_dim] in one layer ``kept`` of a cache; ``at`` is ``KVCache.index``."""
    kept.view(-1, kept.shape[-1]).index_copy_(0, at, new.reshape(-1, kept.shape[-1]).to(kept.dtype))


class KVCache:
    """Keys and values ``[layers, rows, kv_heads, max_len, head_dim]`` (keys already rotated), all zero at first.

    Attention reads the first ``length`` positions; writing reaches all. Zero, not empty: attention gives a masked
    position the weight 0, and 0 x NaN from uninitialised memory is NaN.
    """

    def __init__(
        self, stack: StackConfig, rows: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (stack.layers, rows, stack.kv_heads, max_len, stack.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = max_len
        self._positions = torch.arange(max_len, device=device)
        self._starts = torch.arange(rows * stack.kv_heads, device=device).view(rows, -1, 1) * max_len

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def index(self, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """Where ``write`` puts ``positions`` [B, T] of ``rows`` [B] (default 0 .. B-1): int64 [B * kv_heads * T].

        Positions must lie below ``max_len``: looked up in a table, not added, so that one beyond is an IndexError on
        the CPU and a device assert on CUDA instead of a write into the next row.
        """
        starts = self._starts[: len(positions)] if rows is None else self._starts[rows]
        return (starts + self._positions[positions].unsqueeze(1)).flatten()

    def mask(self, positions: Tensor) -> Tensor:
        """What ``positions`` [B, T] see: [B, 1, T, length], 0 up to their own and -inf beyond. Added to the scores."""
        beyond = self._positions[: self.length] > positions[:, None, :, None]
        return torch.zeros(beyond.shape, dtype=self.keys.dtype, device=beyond.device).masked_fill_(beyond, -torch.inf)

    def upto(self, length: int) -> "KVCache":
        """The same cache, of which attention reads the first ``length`` positions only."""
        view = copy.copy(self)
        view.length = length
        return view

    def clear(self, rows: int) -> None:
        """Zero the first ``rows`` rows."""
        self.keys[:, :rows].zero_()
        self.values[:, :rows].zero_()

    def reset(self, row: int) -> None:
        """Zero one row, so that nothing of its last request (a NaN least of all) can reach the next one."""
        self.keys[:, row].zero_()
        self.values[:, row].zero_()

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy positions 0 .. ``length`` - 1 of one row to another; the rest of ``target`` stays."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def save(self, row: int, length: int) -> Prefix:
        """A copy of positions 0 .. ``length`` - 1 of ``row``."""
        return Prefix(self.keys[:, row, :, :length].clone(), self.values[:, row, :, :length].clone())

    def load(self, row: int, prefix: Prefix, length: int) -> None:
        """Put the first ``length`` positions of ``prefix`` into ``row``; the rest of ``row`` stays."""
        self.keys[:, row, :, :length] = prefix.keys[:, :, :length]
        self.values[:, row, :, :length] = prefix.values[:, :, :length]
