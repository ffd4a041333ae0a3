"""The device that computes and the memory that is free there."""

import pytest
import torch

from csm_core import device
from csm_core.device import free_memory

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:   1500 kB\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 1,500 kB available and, until its files are written, no container."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(device, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    return tmp_path


def contain(folder, limit, used, cached):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_what_linux_calls_available(machine):
    assert free_memory(CPU) == 1500 * 1024


def test_a_containers_limit_counts_and_its_file_cache_is_free(machine):
    contain(machine, 1_000_000, 400_000, 100_000)
    assert free_memory(CPU) == 700_000
    contain(machine, 9_000_000, 400_000, 100_000)
    assert free_memory(CPU) == 1500 * 1024
    contain(machine, "max", 400_000, 100_000)
    assert free_memory(CPU) == 1500 * 1024


def test_a_system_that_does_not_say(machine):
    (machine / "meminfo").unlink()
    assert free_memory(CPU) is None


def test_this_machine_has_memory():
    free = free_memory(CPU)
    assert free is None or free > 2**20


@pytest.mark.gpu
def test_a_gpus_free_memory_falls_with_what_is_allocated():
    place = torch.device("cuda")
    torch.zeros(1, device=place)
    before = free_memory(place)
    held = torch.zeros(2**28, dtype=torch.uint8, device=place)
    assert before - free_memory(place) >= held.nbytes
