"""The pages under docs/: their commands are known and run, their arithmetic is done again."""

import re
from pathlib import Path

import pytest

from csm_core import arguments
from csm_core.bench.floor import frame_bytes
from csm_core.bench.timeline import Timeline
from csm_core.config import CSM_1B, Quantization
from csm_core.engine.memory import Precision
from tests.test_readme import clone, csm_commands, read_blocks, run  # noqa: F401 -- clone is a fixture

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = [(name, block) for name, text in PAGES.items() for block in read_blocks(text) if block.language == "sh"]
PERFORMANCE = PAGES["performance.md"]


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins with ``head``."""
    lines = PERFORMANCE[PERFORMANCE.index(head) :].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_commands_are_known() -> None:
    commands = [arguments.read(words) for text in PAGES.values() for words in csm_commands(text)]
    assert sum(args.command == "bench" for args in commands) >= 5


def test_commands_in_the_text_are_known() -> None:
    for command in re.findall(r"`csm (bench [^`]+)`", PERFORMANCE):
        assert arguments.read(command.split()).command == "bench"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block"), [pytest.param(n, b, id=f"{n} line {b.line}") for n, b in BLOCKS])
def test_commands_run(name: str, block, clone: Path) -> None:  # noqa: F811
    """In a tenth of their time, and not CSM-1B in full size, which takes many minutes on a CPU."""
    lines = [line for line in block.code.splitlines() if "csm-1b" not in line]
    lines = [f"{line} || test $? -eq 1" if "--recommend" in line else line for line in lines]  # 1: nothing meets it
    code = "\n".join(re.sub(r"--budget \d+", "--budget 10", line) for line in lines).replace("--cores 2", "--cores 1")
    run(clone, ["bash", "-euo", "pipefail", "-c", code or "true"])


def test_the_floor_is_the_one_that_is_measured_against() -> None:
    precisions = {
        "fp32": Precision(4),
        "bf16, fp16": Precision(2),
        "int8, fp8": Precision(2, Quantization("int8")),
        "int4, groups of 32": Precision(2, Quantization("int4")),
    }
    found = rows("| weights | GB a frame")
    assert [row[0] for row in found] == list(precisions)
    for name, size, _ in found:
        assert sum(frame_bytes(CSM_1B, precisions[name]).values()) / 1e9 == pytest.approx(float(size), rel=0.03)


def test_the_steps_that_schedules_allow() -> None:
    """Played on a timeline: just inside without a gap, just outside with one."""
    for schedule, limit, _ in rows("| schedule | a step may take"):
        sizes = [int(part) for part in schedule.removesuffix(" (default)").split(",")]
        sizes += sizes[-1:] * 20
        step = float(limit.removesuffix(" ms")) / 1000
        for factor, smooth in ((0.995, True), (1.005, False)):
            made = [sum(sizes[: index + 1]) for index in range(len(sizes))]
            arrivals = [(frames * step * factor, size) for frames, size in zip(made, sizes, strict=True)]
            assert (Timeline(0.0, arrivals).underruns(0.08) == 0) is smooth, schedule  # type: ignore[arg-type]


def test_costs_are_what_follows_from_their_row() -> None:
    weights, cache, work = 9.11e9, 33.6e6, 9.33e9

    def streams(row: list[str], factor: float, limit: float = 0.04) -> int:
        rate, peak, memory = float(row[1]) * 1e9, float(row[2]) * 1e12, float(row[3]) * 1e9
        most = int((0.9 * memory - 3.2e9) // 77e6)  # a slot: window of 2,048 positions, codec state
        fits = [
            n for n in range(most + 1) if factor * max((weights + n * cache) / rate, n * work / 0.6 / peak) <= limit
        ]
        return max(fits, default=0)

    costs = rows("| GPU | GB/s")
    for row in costs:
        assert float(row[5]) == pytest.approx((weights + cache) / float(row[1]) / 1e6, abs=0.06)
        for factor, count, cost in ((1.0, row[6], row[7]), (2.5, row[8], row[9])):
            assert streams(row, factor) == int(count), row[0]
            assert cost == (f"{float(row[4]) / int(count):.4f}" if int(count) else "-")
    assert f"it carries {streams(costs[0], 2.5, limit=0.08)}." in PERFORMANCE
    planned = {row[0]: int(row[8]) for row in costs}
    for name, count, usable, gpus, _ in rows("| GPU | streams per GPU"):
        assert int(count) == planned[name]
        assert int(usable) == int(int(count) - 3 * int(count) ** 0.5)
        assert int(gpus) == -(-10_000 // int(usable))
