"""What one frame makes the host do: operations, launches, waits; by torch's profiler on the engine's own thread.

The profiler is switched on and off inside ``emit``, between two frames: so whole frames are counted, codec included,
whatever the engine does to make them.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch.autograd import profiler_util
from torch.profiler import ProfilerActivity, profile

from csm_core.bench.subject import Subject
from csm_core.engine.engine import Engine
from csm_core.engine.request import End, Event, Failure, Request
from csm_core.errors import EngineError

_CPU = profiler_util.DeviceType.CPU  # type: ignore[attr-defined]

WARM = 3  # frames before the first that is counted
COUNTED = 4  # frames at least

# Operations that only say how memory is to be read.
VIEWS = {
    f"aten::{name}"
    for name in (
        "view as_strided reshape expand expand_as slice select transpose t permute unsqueeze squeeze unflatten flatten "
        "detach alias chunk split narrow view_as unbind movedim lift_fresh resolve_conj resolve_neg is_nonzero "
        "_reshape_alias _unsafe_view broadcast_to diagonal unfold"
    ).split()
}
NO_WORK = VIEWS | {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::resize_"}
KERNEL_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel")
GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync", "cuMemcpy", "cuMemset")
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
)
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "cudaMemcpy"}  # the host wants a value


@dataclass(frozen=True)
class Seen:
    """One event of a profile: its name, whether no other operation did its work, and its time on an accelerator."""

    name: str
    leaf: bool
    device_seconds: float = 0.0


def count(events: Iterable[Seen], frames: int) -> dict[str, float]:
    """Per frame: operations that do work, kernel and graph launches, copies, waits; and seconds on the accelerator."""
    events = list(events)
    names = Counter(event.name for event in events)
    work = [e for e in events if e.leaf and "::" in e.name and e.name not in NO_WORK]

    def calls(prefixes: tuple[str, ...]) -> float:
        return sum(number for name, number in names.items() if name.startswith(prefixes)) / frames

    return {
        "operations": len(work) / frames,
        "kernel_launches": calls(KERNEL_LAUNCHES),
        "graph_launches": calls(GRAPH_LAUNCHES),
        "copies": calls(COPIES),
        "waits": calls(WAITS),
        "reads": sum(names[name] for name in READS - {"aten::item"}) / frames,  # item calls _local_scalar_dense
        "device_ms": 1000 * sum(event.device_seconds for event in events) / frames,
    }


def trace(engine: Engine, subject: Subject) -> dict[str, float]:
    """Count over some frames of a lone caller, in chunks as they are scheduled. Raises EngineError."""
    watch = _Watch(make_profiler(subject.codec.device))
    with make_profiler(subject.codec.device):
        pass  # the first one of a process has to be on the main thread
    longest = WARM + COUNTED + 2 * max(subject.settings.engine.chunk_schedule) + 1
    watch.request = Request(subject.prompt(0), subject.params(longest), watch.emit)
    engine.submit(watch.request)
    if failure := watch.done.get():
        raise EngineError(failure)
    return {"frames": watch.counted, **count(seen(watch.profiler), watch.counted)}


class _Watch:
    """Profiles whole chunks of one request, from the first that ends after WARM frames until COUNTED have been seen."""

    def __init__(self, profiler: profile) -> None:
        self.profiler = profiler
        self.request: Request | None = None
        self.done: SimpleQueue[str] = SimpleQueue()
        self.counted = 0
        self._frames = 0
        self._since: int | None = None

    def emit(self, event: Event) -> None:
        if isinstance(event, Failure):
            self.done.put(str(event.error))
        elif isinstance(event, End):
            self.done.put("" if self.counted else "The speech ended before a frame was counted.")
        elif not self.counted:
            self._frames += len(event.codes)
            if self._since is None:
                if self._frames >= WARM:
                    self._since = self._frames
                    self.profiler.start()
            elif self._frames - self._since >= COUNTED:
                self.profiler.stop()
                self.counted = self._frames - self._since
                assert self.request is not None
                self.request.cancelled = True


def make_profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities)


def seen(profiler: profile) -> list[Seen]:
    """The events of a profile that has been stopped."""
    events: list[Any] = list(profiler.events() or [])  # type: ignore[no-untyped-call]
    return [
        Seen(
            event.name,
            not any("::" in child.name and child.name not in NO_WORK for child in event.cpu_children),
            0.0 if event.device_type == _CPU else event.time_range.elapsed_us() / 1e6,
        )
        for event in events
    ]
