"""What crosses the line to the engine's thread: the request downwards, its events upwards.

A request gets any number of chunks and then exactly one end or failure. Knows no text, voice, format, retry or HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from torch import Tensor

from csm_core.errors import CsmError

FinishReason = Literal["eos", "length", "silence", "cancelled", "timeout"]

_ids = count(1)


@dataclass(frozen=True)
class SamplingParams:
    """How the codes of one request are drawn. ``temperature`` 0 is argmax; ``seed`` is a signed 64-bit number."""

    temperature: float = 0.9
    top_k: int = 50
    seed: int = 0
    max_frames: int = 1125  # 90 s
    min_frames: int = 4  # 0.32 s in which the end is banned: no word is shorter, an empty take is no answer


@dataclass(frozen=True)
class Chunk:
    """The next frames of a request: ``codes`` int64 [n, K] and their ``pcm`` float32 [n * frame_size], on the CPU."""

    codes: Tensor
    pcm: Tensor


@dataclass(frozen=True)
class End:
    """The request is complete, or was stopped for ``reason``."""

    reason: FinishReason


@dataclass(frozen=True)
class Failure:
    """The request died of ``error``; its cause, if any, is chained for the log."""

    error: CsmError


Event = Chunk | End | Failure


@dataclass(eq=False)
class Request:
    """One piece of speech to make: ``prompt`` int64 [T, K+1] on the CPU, T >= 1.

    ``emit`` is called on the engine's thread and must neither block nor raise. ``cancelled`` may be set by any thread
    at any time and is honoured between two frames; ``deadline`` (``time.monotonic()``) likewise. ``follow_up``: the
    next take or sentence of a speech that has begun; a full queue does not refuse it and newcomers wait behind it.
    """

    prompt: Tensor
    params: SamplingParams
    emit: Callable[[Event], None]
    deadline: float | None = None
    follow_up: bool = False
    cancelled: bool = False
    id: int = field(default_factory=lambda: next(_ids))
