"""Which device computes, and how much memory is free there. Asks the machine, changes nothing."""

from pathlib import Path

import torch

from csm_core.errors import InvalidInputError

CGROUP = Path("/sys/fs/cgroup")  # version 2, as containers see their own
MEMINFO = Path("/proc/meminfo")


def pick_device(device: str | None = None) -> torch.device:
    """The device that was asked for, else the best there is: cuda, mps, cpu. Raises InvalidInputError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(kind for kind, available in there.items() if available))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(f"device must be cuda, mps or cpu, not {device!r:.40}.", "device") from error
    if not there.get(chosen.type, False) or (
        chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    ):
        available = ", ".join(kind for kind, available in there.items() if available)
        raise InvalidInputError(f"There is no device {device} here; available: {available}.", "device")
    return chosen


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``, as far as the system says; None where it does not."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min((size for size in (_machine(), _container()) if size is not None), default=None)


def _machine() -> int | None:
    """Linux's own estimate of what programs can get without swapping, caches given back."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _container() -> int | None:
    """What a container's limit leaves; file caches inside it count as free."""
    limit, used, stat = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    counts = dict(line.split() for line in stat.read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(counts["inactive_file"])
