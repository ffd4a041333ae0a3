"""Latency against load as a picture. Needs matplotlib, which only this file imports (the extra ``bench``)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Left: first sound against load, open loop. Right: ms per frame and speed against callers, closed loop."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _latency(left, result.get("streams", {}))
    _batches(right, result.get("batch", {}))
    about = result["about"]
    figure.suptitle(
        f"{about['model']}, {about['weights']}; {about['machine']}, {about['threads']} threads, "
        f"torch {about['torch']}, commit {about['commit'] or 'unknown'}\n{about['command']}",
        fontsize=8,
    )
    figure.savefig(file, dpi=120)


def _latency(axes: Any, found: Mapping[str, Any]) -> None:
    stages = sorted((s for s in found.get("stages", []) if s["requests"]), key=lambda stage: stage["streams"])
    loads = [stage["streams"] for stage in stages]
    for name in ("p50", "p95", "p99"):
        values = [stage["ttfa_ms"][name] for stage in stages]
        axes.plot(loads, [math.nan if value is None else value for value in values], marker="o", label=name)
    if stages:
        axes.axhline(found["ttfa_limit_ms"], color="grey", linestyle="--", label="limit")
        axes.set_yscale("log")
        axes.legend()
    broken = [stage["streams"] for stage in stages if stage["with_underruns"]]
    for load in broken:
        axes.axvline(load, color="red", alpha=0.2)
    axes.set(title="Poisson arrivals (red: somebody heard a gap)", xlabel="streams", ylabel="time to first audio, ms")


def _batches(axes: Any, found: Mapping[str, Any]) -> None:
    rows = [row for row in found.get("rows", []) if "skipped" not in row]
    callers = [row["callers"] for row in rows]
    axes.plot(callers, [row["ms_per_frame"] for row in rows], marker="o", label="ms per frame")
    if rows and "floor_ms" in rows[0]:
        axes.plot(callers, [row["floor_ms"] for row in rows], linestyle=":", label="memory floor, ms")
    axes.set(title="callers who start together", xlabel="callers", ylabel="ms per frame", ylim=(0, None))
    speed = axes.twinx()
    speed.plot(callers, [row["times_real_time"] for row in rows], color="green", marker="s", label="x real time, all")
    speed.set(ylabel="seconds of speech a second", ylim=(0, None))
    if rows:
        lines = [*axes.get_lines(), *speed.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines])
