"""Where a frame's time goes: backbone, depth decoder, heads and sampling, codec; the engine's own share is the rest.

Each part runs alone on the plain path, a few times. On the CPU that is wall time; on CUDA, where the plain path waits
for its launches and a graph does not, it is the time of the kernels on the device.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from csm_core.bench.machine import synchronize
from csm_core.bench.subject import Subject
from csm_core.bench.trace import make_profiler, seen
from csm_core.engine.sampling import Draw, gumbel, sample
from csm_core.model.kv_cache import KVCache

LENGTH_STEP = 128  # the engine's caches are read in pieces of about this length


@torch.no_grad()
def part_times(subject: Subject, batch: int, positions: int, repeats: int) -> dict[str, float]:
    """Milliseconds per frame of ``batch`` streams with ``positions`` in their caches, by part."""
    model, codec, config = subject.model, subject.codec, subject.model.config
    device = codec.device
    length = min(-(-(positions + 1) // LENGTH_STEP) * LENGTH_STEP, config.max_seq_len)
    cache = KVCache(config.backbone, batch, length, subject.dtype, device)
    frames = subject.prompt(0)[-1].expand(batch, 1, -1).to(device)
    at = torch.full((batch, 1), min(positions, length - 1), device=device)
    hidden = model.forward_backbone(frames, at, cache)[:, -1]
    narrow = torch.zeros(batch, config.depth.dim, dtype=hidden.dtype, device=device)
    first = torch.zeros(batch, dtype=torch.int64, device=device)
    logits = model.codebook0_logits(hidden)[:, : config.codebook_size]
    limit = min(subject.profile.top_k, config.codebook_size)
    heat = torch.full((batch,), subject.profile.temperature, device=device)
    draw = Draw.of(heat, torch.full_like(first, limit), limit)

    def heads() -> None:
        model.codebook0_logits(hidden)
        for codebook in range(1, config.num_codebooks):
            model.audio_logits(narrow, codebook)

    def sampling() -> None:
        noise = gumbel(first, first, config.num_codebooks, config.codebook_size)
        for codebook in range(config.num_codebooks):
            sample(logits, noise[:, codebook], draw, limit)

    size = subject.settings.engine.chunk_schedule[-1]
    stream = codec.stream(batch, fast=subject.settings.engine.fast_codec)
    codes = torch.ones(batch, size, config.num_codebooks, dtype=torch.int64)
    times = {
        "backbone": _milliseconds(lambda: model.forward_backbone(frames, at, cache), device, repeats),
        "depth": _milliseconds(lambda: model.decode_frame(hidden, lambda *_: first), device, repeats),
        "heads": _milliseconds(heads, device, repeats),
        "sampling": _milliseconds(sampling, device, repeats),
        "codec": _milliseconds(lambda: stream.push(codes), device, repeats) / size,
    }
    times["depth"] = max(0.0, times["depth"] - times["heads"])
    return times


def _milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    work()  # the first time allocates
    if device.type == "cuda":
        synchronize(device)
        with make_profiler(device) as profiler:
            for _ in range(repeats):
                work()
            synchronize(device)
        return 1000 * sum(event.device_seconds for event in seen(profiler)) / repeats
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 1000 * median(times)
