"""The result of a bench as text: one table per section, each under the line that says where its figures are from."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Sequence[object]


def report(result: Mapping[str, Any]) -> str:
    """All sections that were measured, what was skipped, and the command; or what a search found."""
    if "trials" in result:
        return _search(result)
    about = result["about"]
    blocks = [_about(about)]
    blocks += [f"{title}\n{show(result[name])}" for name, (title, show) in _SECTIONS.items() if name in result]
    if result.get("skipped"):
        blocks.append("skipped\n" + "\n".join(f"  {item['section']}: {item['reason']}" for item in result["skipped"]))
    blocks.append(f"{result['seconds']:.0f} s; {about['command']}")
    return "\n\n".join(blocks)


def _about(about: Mapping[str, Any]) -> str:
    cuda = f" (CUDA {about['cuda']})" if about["cuda"] else ""
    settings = ", ".join(f"{name}={_value(value)}" for name, value in about["settings"].items())
    return (
        f"{about['model']}, {about['weights']}, {about['parameters'] / 1e6:,.1f} M parameters, on {about['device']}\n"
        f"{about['machine']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}{cuda}, "
        f"commit {about['commit'] or 'unknown'}, {about['date']}\n{settings}"
    )


def _floor(found: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in found["bytes_per_frame"].items())
    read = f"{_bytes(found['total_bytes'])} read per frame ({parts})"
    return f"  {read}\n  at the {found['bandwidth'] / 1e9:.1f} GB/s measured here: {found['ms']:.3g} ms"


def _batch(found: Mapping[str, Any]) -> str:
    head = ("callers", "ms/frame", "x floor", "frames/s", "x real time", "RTF p95", "TTFA p95 ms", "with gaps")
    rows: list[Row] = []
    for row in found["rows"]:
        if "skipped" in row:
            continue
        speeds = (
            row["ms_per_frame"],
            row.get("times_floor", math.nan),
            row["frames_per_second"],
            row["times_real_time"],
        )
        rows.append((row["callers"], *speeds, row["rtf"]["p95"], row["ttfa_ms"]["p95"], row["with_underruns"]))
    late = [f"\n  {row['callers']}: {row['skipped']}" for row in found["rows"] if "skipped" in row]
    return table(head, rows) + "".join(late)


def _ttfa(found: Mapping[str, Any]) -> str:
    names = {
        "no_voice": "no voice",
        "new_voice": f"a voice of {found['voice_seconds']:.0f} s, new",
        "known_voice": f"a voice of {found['voice_seconds']:.0f} s, known",
    }
    rows = [(label, *_three(found[name]), found[name]["n"]) for name, label in names.items() if name in found]
    note = f"\n  known voice: {found['known_voice_skipped']}" if "known_voice_skipped" in found else ""
    return table(("ms", "p50", "p95", "p99", "n"), rows) + note


def _streams(found: Mapping[str, Any]) -> str:
    first = f"  {found['streams']:.3g} streams: {found['why']}"
    if not found["stages"]:
        return first
    head = ("streams", "requests", "TTFA p50 ms", "p95", "p99", "with gaps", "failed", "RTF p50", "holds")
    rows = [
        (
            stage["streams"],
            stage["requests"],
            *(_three(stage["ttfa_ms"]) if stage["requests"] else [math.nan] * 3),
            stage["with_underruns"],
            stage["failed"],
            stage["rtf"]["p50"],
            "yes" if stage["holds"] else "no",
        )
        for stage in found["stages"]
    ]
    limits = f"TTFA p95 <= {found['ttfa_limit_ms']:.0f} ms, {100 * found['continuity']:.0f} % play without a gap"
    return f"{first} ({limits})\n{table(head, rows)}"


def _launches(found: Mapping[str, Any]) -> str:
    head = ("operations", "kernel launches", "graph launches", "copies", "waits", "values read", "device ms")
    keys = ("operations", "kernel_launches", "graph_launches", "copies", "waits", "reads", "device_ms")
    return table(head, [[found[key] for key in keys]])


def _parts(found: Mapping[str, Any]) -> str:
    keys = ("callers", "frame_ms", "backbone", "depth", "heads", "sampling", "codec", "rest")
    return table(keys, [[row[key] for key in keys] for row in found["rows"]])


def _speech(found: Mapping[str, Any]) -> str:
    rows = [
        (
            name.removeprefix("callers_"),
            heard["requests"],
            *_three(heard["ttfa_ms"]),
            heard["rtf"]["p50"],
            heard["rtf"]["p95"],
            heard["with_underruns"],
        )
        for name, heard in found.items()
        if "skipped" not in heard
    ]
    late = [f"\n  {name.removeprefix('callers_')}: {row['skipped']}" for name, row in found.items() if "skipped" in row]
    return table(("callers", "sentences", "TTFA p50 ms", "p95", "p99", "RTF p50", "p95", "with gaps"), rows) + "".join(
        late
    )


def _peers(found: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{name} {row.get('version', '')} {row.get('dtype', '').removeprefix('torch.')}".strip(),
            row["ms_per_frame"],
            row["times_ours"],
            f"{row['same_codes']:.2f}" if "same_codes" in row else "",
        )
        for name, row in found["contenders"].items()
    ]
    return table(("in turns", "ms/frame", "x ours", "greedy codes equal"), rows)


def _memory(found: Mapping[str, Any]) -> str:
    planned = ", ".join(f"{name} {_bytes(size)}" for name, size in found["planned"].items() if size)
    names = {
        "engine": "engine at its start",
        "rss": "main memory of the process",
        "rss_peak": "its peak",
        "device": "on the device",
        "device_peak": "its peak",
        "device_reserved": "held by the allocator",
    }
    lines = [f"  {label}: {_bytes(found[key])}" for key, label in names.items() if found.get(key) is not None]
    return "\n".join([f"  planned: {planned}", *lines])


_SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "floor": ("floor: bytes of a frame over the memory's bandwidth", _floor),
    "batch": ("batch: callers who start together", _batch),
    "ttfa": ("TTFA of a lone caller, request to first chunk", _ttfa),
    "speech": ("speech: whole sentences through Generator.stream", _speech),
    "streams": ("streams per device: Poisson arrivals", _streams),
    "launches": ("launches: what one frame of a lone caller makes the host do", _launches),
    "parts": ("parts: ms per frame, each part alone on the plain path; rest = frame - parts", _parts),
    "peers": ("peers: the same weights and prompt in the same process; ours with codec, the others without", _peers),
    "memory": ("memory", _memory),
}


def _search(result: Mapping[str, Any]) -> str:
    target = result["target"]
    names = list(result["trials"][0]["values"])
    rows = [
        [
            *(_value(trial["values"][name]) for name in names),
            *(trial[key] for key in ("callers", "rtf", "ttfa_ms", "with_underruns")),
            "yes" if trial["meets"] else "no",
        ]
        for trial in result["trials"]
    ]
    tried = table((*names, "callers", "RTF p95", "TTFA p95 ms", "with gaps", "meets"), rows)
    aim = f"target: RTF <= {target['rtf']:g} and TTFA <= {target['ttfa_ms']:g} ms at the 95th percentile, no gaps"
    blocks = [_about(result["about"]), f"{aim}\n{tried}"]
    if result["not_tried"]:
        lines = [
            f"  {', '.join(f'{name}={_value(value)}' for name, value in values.items())}"
            for values in result["not_tried"]
        ]
        blocks.append("\n".join(["not tried (the budget was used up, unless it says why)", *lines]))
    if found := result["recommended"]:
        blocks.append(f"use, for {found['callers']} callers at once:\n" + _words(result["use"]))
    else:
        blocks.append("nothing that was tried meets the target; the nearest:\n" + _words(result["use"]))
    return "\n\n".join([*blocks, f"{result['seconds']:.0f} s; {result['about']['command']}"])


def _words(use: Mapping[str, str]) -> str:
    return "\n".join(f"  {label}: {use[label]}" for label in ("python", "environment", "options") if use[label])


def table(head: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns as wide as they need, the first to the left, numbers to three digits."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells if column < len(row)) for column in range(len(head))]
    return "\n".join("  " + "  ".join(_pad(text, index, widths) for index, text in enumerate(row)) for row in cells)


def _pad(text: str, index: int, widths: Sequence[int]) -> str:
    return text.ljust(widths[index]) if index == 0 else text.rjust(widths[index])


def _cell(value: object) -> str:
    if value is None:  # what JSON cannot say: infinite, or not a number
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _three(found: Mapping[str, Any]) -> list[float]:
    return [math.nan if found[name] is None else found[name] for name in ("p50", "p95", "p99")]


def _value(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
