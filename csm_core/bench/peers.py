"""Other implementations beside this one: in the same process, with the same weights and prompt, turn and turn about.

A machine's speed drifts, so two runs one after the other compare the machine with itself; turns do not. Each peer is a
module ``peer_<name>`` that is imported when it is asked for, because it needs a package that nothing else needs.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from csm_core.bench.subject import NEVER, Subject
from csm_core.engine.engine import Engine
from csm_core.engine.request import Chunk, Event, Failure, Request
from csm_core.errors import CsmError

ROUNDS = 3
SHORT, LONG = 2, 50  # frames
PEERS = {"transformers": "transformers", "sesame": "torchtune"}  # name -> the package that it needs


Speak = Callable[..., Tensor]  # (frames, greedy) -> codes


class Peer(Protocol):
    """Another implementation that holds the subject's weights."""

    version: str
    dtype: torch.dtype

    def frames(self, text_ids: Sequence[int], count: int, greedy: bool = False) -> Tensor:
        """Speak a text for ``count`` frames: codes int64 [count, K] on the CPU. Its own loop, its own sampling."""
        ...


class PeerMissingError(CsmError):
    """A peer's package is not installed."""


def load_peer(name: str, subject: Subject) -> Peer:
    """Build a peer around the subject's weights. Raises PeerMissingError."""
    try:
        module = importlib.import_module(f"csm_core.bench.peer_{name}")
    except ModuleNotFoundError as error:
        raise PeerMissingError(
            f"not installed: it needs {PEERS[name]} (the package {error.name} is missing)"
        ) from error
    peer: Peer = module.build(subject)
    return peer


def ours(engine: Engine, subject: Subject, count: int, greedy: bool = False) -> Tensor:
    """The same from this engine, whose codec runs as well: codes int64 [count, K]."""
    done: SimpleQueue[Event] = SimpleQueue()
    params = subject.params(count, temperature=0.0 if greedy else None)
    engine.submit(Request(subject.prompt(0), params, done.put))
    chunks = []
    while isinstance(event := done.get(), Chunk):
        chunks.append(event.codes)
    if isinstance(event, Failure):
        raise event.error
    return torch.cat(chunks)


def race(subject: Subject, peers: Mapping[str, Peer], seconds: float) -> dict[str, Any]:
    """Milliseconds per frame of each, in turns; the prompt's share is taken out by a second, shorter run of each.

    Ours goes through the engine and includes the codec (one chunk at the end); a peer's ends with its codes.
    ``same_codes``: the share of greedy codes that agree with ours, 1.0 where both are exact (fp32).
    """
    text_ids = subject.prompt(0)[:, -1].tolist()
    with subject.engine(slots=1, chunk_schedule=(NEVER,)) as engine:
        contenders: dict[str, Speak] = {
            "csm_core": lambda count, greedy=False: ours(engine, subject, count, greedy),
            **{name: _bound(peer, text_ids) for name, peer in peers.items()},
        }
        greedy = {name: speak(SHORT, greedy=True) for name, speak in contenders.items()}  # a warm-up as well
        round_of_short = sum(_seconds(speak, SHORT) for speak in contenders.values())
        frames = int(min(max(SHORT * seconds / ROUNDS / round_of_short - SHORT, 2 * SHORT), LONG))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, speak in contenders.items():
                times[name].append((_seconds(speak, frames) - _seconds(speak, SHORT)) / (frames - SHORT))
    results: dict[str, Any] = {}
    for name, own in times.items():
        ratios = [theirs / mine for theirs, mine in zip(own, times["csm_core"], strict=True)]
        rounds = [1000 * each for each in own]
        results[name] = {"ms_per_frame": median(rounds), "times_ours": median(ratios), "rounds": rounds}
        if name != "csm_core":
            peer = peers[name]
            agree = (greedy[name] == greedy["csm_core"]).float().mean().item()
            results[name] |= {"version": peer.version, "dtype": str(peer.dtype), "same_codes": agree}
    return {"frames": frames - SHORT, "prompt": len(text_ids), "contenders": results}


def _bound(peer: Peer, text_ids: Sequence[int]) -> Speak:
    return lambda count, greedy=False: peer.frames(text_ids, count, greedy)


def _seconds(speak: Speak, count: int) -> float:
    started = time.perf_counter()
    codes = speak(count)
    if len(codes) != count:
        raise CsmError(f"A contender made {len(codes)} frames instead of {count}.")
    return time.perf_counter() - started
