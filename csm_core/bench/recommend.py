"""Which settings reach a target: try combinations on this machine, keep the one that serves the most callers.

The search is plain: every combination, callers doubled until the target breaks. What is measured stays the engine.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

from csm_core.bench import switches
from csm_core.bench.subject import Subject
from csm_core.bench.timeline import summary
from csm_core.bench.traffic import closed_loop
from csm_core.config import EngineConfig, Settings
from csm_core.engine.engine import Engine
from csm_core.errors import InvalidInputError

EACH = 3  # requests that every caller sends, one after another: so newcomers meet speakers
FRAMES = 30  # of a speech, 2.4 seconds
EXACT = (None, "off", "fp16", "bf16")  # what rounds more is recommended only where these do not do as well


@dataclass(frozen=True)
class Target:
    """What callers need: RTF and TTFA at the 95th percentile, and no gaps."""

    rtf: float = 0.9
    ttfa_ms: float = 300.0


@dataclass(frozen=True)
class Trial:
    """One combination with some callers, measured."""

    values: Mapping[str, Any]
    callers: int
    rtf: float
    ttfa_ms: float
    with_underruns: int
    failed: int

    def meets(self, target: Target) -> bool:
        heard = not self.with_underruns and not self.failed
        return heard and self.rtf <= target.rtf and self.ttfa_ms <= target.ttfa_ms


def combinations(choices: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination; the first name varies slowest, so put there what is dear to change."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def climb(slots: int, measure: Callable[[int], Trial], target: Target) -> list[Trial]:
    """Trials at 1, 2, 4 ... callers, until the target breaks or all slots are taken."""
    trials: list[Trial] = []
    callers = 1
    while callers <= slots:
        trials.append(measure(callers))
        if not trials[-1].meets(target):
            break
        callers = min(2 * callers, slots) if callers < slots else slots + 1
    return trials


def best(trials: Iterable[Trial], target: Target) -> Trial | None:
    """Of those that meet the target: most callers, then 16 bits or more, then the earliest first sound."""
    good = [trial for trial in trials if trial.meets(target)]
    return max(good, key=lambda t: (t.callers, t.values.get("quantize") in EXACT, -t.ttfa_ms), default=None)


def nearest(trials: Sequence[Trial], target: Target) -> Trial:
    """The one that misses by the smallest factor, for saying so."""
    return min(trials, key=lambda t: max(t.rtf / target.rtf, t.ttfa_ms / target.ttfa_ms))


# --- measuring -------------------------------------------------------------------------------------------------------

Opened = Callable[[Settings], AbstractContextManager[tuple[Subject, Engine]]]


def search(
    opened: Opened, settings: Settings, choices: Mapping[str, Sequence[Any]], target: Target, budget: float
) -> dict[str, Any]:
    """Try every combination within ``budget`` seconds. ``opened(settings)`` makes its subject and engine.

    Returns ``recommended`` (None if nothing meets the target), ``nearest``, all ``trials`` and what was ``not_tried``.
    """
    until = time.monotonic() + budget
    trials: list[Trial] = []
    left_out: list[dict[str, Any]] = []
    for values in combinations(choices):
        if trials and time.monotonic() >= until:
            left_out.append(values)
            continue
        tried = switches.apply(settings, values.items())
        try:
            with opened(tried) as (subject, engine):
                trials += _try(subject, engine, values, target)
        except InvalidInputError as error:  # a mode that the device does not have, or that the voice does not survive
            left_out.append({**values, "why": str(error)})
    if not trials:
        raise InvalidInputError(f"Nothing could be tried: {left_out[0]['why']}", "try")
    found = best(trials, target)
    return {
        "target": target,
        "recommended": found,
        "nearest": nearest(trials, target),
        "trials": trials,
        "not_tried": left_out,
    }


def _try(subject: Subject, engine: Engine, values: Mapping[str, Any], target: Target) -> list[Trial]:
    measure(subject, engine, values, 1)  # warms up
    return climb(subject.settings.engine.slots, lambda callers: measure(subject, engine, values, callers), target)


def measure(subject: Subject, engine: Engine, values: Mapping[str, Any], callers: int) -> Trial:
    """Callers who speak three times each, one after another."""
    timelines = closed_loop(engine, lambda n: (subject.prompt(n), subject.params(FRAMES, seed=n)), callers, EACH)
    heard = summary(timelines, subject.frame_seconds)
    return Trial(
        dict(values), callers, heard["rtf"]["p95"], heard["ttfa_ms"]["p95"], heard["with_underruns"], heard["failed"]
    )


def as_settings(settings: Settings, trial: Trial) -> Settings:
    """The settings to use: what was tried, with as many slots as callers were served."""
    tried = switches.apply(settings, trial.values.items())
    return replace(tried, engine=replace(tried.engine, slots=trial.callers))


def in_words(settings: Settings) -> dict[str, str]:
    """How to use settings: the line of Python, the lines for the environment where it reads them, the bench's options.

    Only what differs from the defaults.
    """
    engine = _differing(settings.engine, EngineConfig())
    own = {name: value for name, value in _differing(settings, Settings()).items() if name in switches.OF_SETTINGS}
    parts = [f"{name}={value!r}" for name, value in own.items()]
    parts.append(f"engine=EngineConfig({', '.join(f'{name}={value!r}' for name, value in engine.items())})")
    both = {**engine, **own}
    environment = [f"CSM_{name.upper()}={_text(value)}" for name, value in both.items() if _from_env(name, value)]
    options = [f"--set {name}={_text(value)}" for name, value in both.items()]
    return {
        "python": f"Settings({', '.join(parts)})",
        "environment": " ".join(environment),
        "options": " ".join(options),
    }


def _differing(value: Any, default: Any) -> dict[str, Any]:
    pairs = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: item for name, item in pairs.items() if item != getattr(default, name)}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _from_env(name: str, value: Any) -> bool:
    """Whether ``Settings.from_env`` reads it."""
    read = Settings.from_env({f"CSM_{name.upper()}": _text(value)})
    return bool(value in (getattr(read, name, math.nan), getattr(read.engine, name, math.nan)))
