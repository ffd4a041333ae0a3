"""One function over static tensors, per shape: recorded once, then replayed. And torch.compile that counts.

On CUDA a recording is a CUDA graph: thousands of kernels with one launch. Elsewhere there is nothing to gain and the
function is called. Knows no model and no slots: the caller promises that the function reads and writes tensors that
stay where they are, asks the host for nothing, and may be run for practice before it is recorded.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

Shape = TypeVar("Shape")
Function = TypeVar("Function", bound=Callable[..., Any])

Play = Callable[[], Tensor]
Record = Callable[[Play], Play]

PRACTICE_RUNS = 2  # before a recording: kernels are compiled, libraries choose theirs and allocate

# Compilations that one function may have before torch refuses: six shapes for each of seven batch buckets, and room.
RECOMPILE_LIMIT = 128


class Graphs(Generic[Shape]):
    """``function(shape)`` for hashable shapes, each recorded on its first ``prepare``.

    ``recordings`` and ``replays`` count: after a complete warm-up the first must stand still.
    """

    def __init__(self, function: Callable[[Shape], Tensor], record: Record | None) -> None:
        self.recordings = 0
        self.replays = 0
        self._function = function
        self._record = record
        self._plays: dict[Shape, Play] = {}

    def __contains__(self, shape: Shape) -> bool:
        return shape in self._plays

    def prepare(self, shape: Shape) -> None:
        """Record a shape. The function is run for practice: its effects must not matter now."""

        def play() -> Tensor:
            return self._function(shape)

        if self._record is None:
            play()
            self._plays[shape] = play
        else:
            self._plays[shape] = self._record(play)
        self.recordings += 1

    def __call__(self, shape: Shape) -> Tensor:
        """Run a shape that was prepared. The result is overwritten by the next call of any shape."""
        self.replays += 1
        return self._plays[shape]()


class CudaRecorder:
    """Records into CUDA graphs that share their memory: they must be replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, play: Play) -> Play:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(PRACTICE_RUNS):
                    play()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile (a codec that encodes): only this one's calls are held to the rules.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = play()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class Compiler:
    """torch.compile with fixed shapes and no fall-back to plain Python; ``compilations`` counts what it compiled."""

    def __init__(self, backend: str = "inductor") -> None:
        self.compilations = 0
        self._backend = torch._dynamo.lookup_backend(backend)
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)

    def __call__(self, function: Function) -> Function:
        return cast(Function, torch.compile(function, fullgraph=True, dynamic=False, backend=self._compile))

    def _compile(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        compiled: Callable[..., Any] = self._backend(module, inputs)
        return compiled
