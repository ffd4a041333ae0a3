"""What a CUDA graph does, on the CPU: the operations of one run, replayed on the very same tensors.

A value that the host decided is in the recording for ever; a tensor that was put elsewhere meanwhile is not seen; what
an operation made is overwritten in place by each replay. So code that replays correctly here asks the host for nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tape(TorchDispatchMode):
    """A recorder for ``Graphs``: ``Tape.record(play)`` runs ``play`` once and returns what replays it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host reads a value")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def _replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_iter(result), tree_iter(again), strict=True):
                # A view and an operation in place give back the memory that they were given.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @staticmethod
    def record(play: Callable[[], Tensor]) -> Callable[[], Tensor]:
        play()  # for practice, as on CUDA
        tape = Tape()
        with torch.no_grad(), tape:
            result = play()

        def replay() -> Tensor:
            with torch.no_grad():
                tape._replay()
            return result

        return replay
