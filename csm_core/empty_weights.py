"""Build a network of its shapes alone, for weights that come from a file.

Knows no network: whatever is constructed inside ``empty_weights()`` lies on the meta device and is not initialised.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, modules get no memory for weights; they get the weights by ``load_state_dict(assign=True)``."""
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device its random fills do nothing but load a compiler, for 2 to 4 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
