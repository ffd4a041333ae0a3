"""Keys and values of one transformer stack: static tensors, one row per slot.

Allocated once and never grown. Knows no requests and no schedule: the caller says which row and which positions.
"""

import copy

import torch
from torch import Tensor

from csm_core.config import StackConfig


class KVCache:
    """Keys and values ``[layers, rows, kv_heads, max_len, head_dim]`` (keys already rotated), all zero at first.

    Zero, not empty: attention gives a masked position the weight 0, and 0 x NaN from uninitialised memory is NaN.
    """

    def __init__(
        self, stack: StackConfig, rows: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (stack.layers, rows, stack.kv_heads, max_len, stack.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Store ``k`` and ``v`` [B, kv_heads, T, head_dim] at ``positions`` [B, T] of ``rows`` [B]; no host sync.

        Positions must lie below ``max_len`` (IndexError on CPU, a device assert on CUDA).
        """
        at = rows[:, None]
        self.keys[layer][at, :, positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][at, :, positions] = v.transpose(1, 2).to(self.values.dtype)

    def upto(self, length: int) -> "KVCache":
        """The first ``length`` positions, sharing storage: attention through it does not read the unused rest."""
        view = copy.copy(self)
        view.keys = self.keys[:, :, :, :length]
        view.values = self.values[:, :, :, :length]
        return view

    def reset(self, row: int) -> None:
        """Zero one row, so that nothing of its last request (a NaN least of all) can reach the next one."""
        self.keys[:, row].zero_()
        self.values[:, row].zero_()

    def copy_prefix(self, src_row: int, dst_row: int, length: int) -> None:
        """Copy positions 0 .. ``length`` - 1 of ``src_row`` to ``dst_row``; the rest of ``dst_row`` stays."""
        self.keys[:, dst_row, :, :length] = self.keys[:, src_row, :, :length]
        self.values[:, dst_row, :, :length] = self.values[:, src_row, :, :length]
