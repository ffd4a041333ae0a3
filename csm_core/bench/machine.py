"""The machine: what it is called, how fast it reads memory, how much of it this process holds. Knows no model."""

import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from csm_core.errors import InvalidInputError

PROBE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far beyond any cache: 256 MB are read in 10 ms of one core
PROBE_RUNS = 9


def facts(device: torch.device, command: list[str], name: str | None = None) -> dict[str, Any]:
    """What every figure has to be read with. ``name`` replaces the hardware's own."""
    return {
        "machine": name or machine_name(device),
        "device": str(device),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "csm_core": _version(),
        "commit": commit(),
        "command": shlex.join(command),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def machine_name(device: torch.device) -> str:
    """The hardware, not the host: that says more, and may be published."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(count: int) -> None:
    """Keep this process to ``count`` cores, torch's threads as well; for good. Raises InvalidInputError."""
    if not hasattr(os, "sched_setaffinity"):
        raise InvalidInputError("--cores needs Linux; elsewhere --threads limits torch.", "cores")
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise InvalidInputError(f"--cores must be 1 to {len(allowed)}, what this process may use.", "cores")
    os.sched_setaffinity(0, allowed[-count:])  # systems like to do their own work on the first one
    torch.set_num_threads(min(count, torch.get_num_threads()))


def _version() -> str:
    try:
        return importlib.metadata.version("csm-core")
    except importlib.metadata.PackageNotFoundError:  # run from a folder
        return "not installed"


def commit() -> str | None:
    """The commit of the code that runs, ``-dirty`` with changes; None where there is no repository or no git."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603 -- fixed
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large sum reads: the floor's denominator. The best of some runs, on torch's threads.

    A neighbour on the same memory slows it: so it is measured in the run that it is compared with.
    """
    count = PROBE_BYTES.get(device.type, PROBE_BYTES["cpu"]) // 4
    values = torch.ones(count, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(PROBE_RUNS):
        synchronize(device)
        started = time.perf_counter()
        values.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return values.nbytes / best


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process holds, and the most it has held, in main memory and on the device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    held = {"rss_peak": peak, "rss": resident() or peak}
    if device.type == "cuda":
        held["device"] = torch.cuda.memory_allocated(device)
        held["device_peak"] = torch.cuda.max_memory_allocated(device)
        held["device_reserved"] = torch.cuda.memory_reserved(device)
    return held


def resident() -> int | None:
    """Bytes in main memory now, where the system says so (Linux)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else None
