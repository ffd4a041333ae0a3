"""Silence policy: hears the level of a take window by window and says pass, hold, retry or stop; plans further takes.

Pure Python over numbers: knows no tensors, no clock, no engine, and nothing of how the PCM is buffered or sent.
"""

from dataclasses import dataclass
from typing import Literal

from csm_core.config import SilenceConfig

Action = Literal["pass", "hold", "retry", "stop"]

# Weyl increments (2**64 / golden ratio, and the one of MurmurHash3's 64-bit finaliser): far apart for neighbours.
TAKE_STRIDE = 0x9E3779B97F4A7C15
SENTENCE_STRIDE = 0xC4CEB9FE1A85EC53


@dataclass(frozen=True)
class Take:
    """One attempt at a sentence and what it was sampled with."""

    sentence: int
    number: int  # 0 is the first attempt
    temperature: float
    top_k: int
    seed: int


def derive_seed(seed: int, sentence: int, take: int) -> int:
    """A signed 64-bit seed of its own for every take of every sentence; the first of both keeps ``seed``."""
    mixed = (seed + sentence * SENTENCE_STRIDE + take * TAKE_STRIDE) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed


def plan_take(first: Take, number: int, config: SilenceConfig) -> Take:
    """Take ``number`` of the sentence that ``first`` began: each cooler and narrower, down to the floors of ``config``.

    Below the floors there is little to draw from and the silent take would come again: at temperature 0 or top-k 1 the
    very same one, for argmax knows no seed. So a caller who asked for less gets it once, and the floors from then on.
    """
    if number == 0:
        return first
    return Take(
        sentence=first.sentence,
        number=number,
        temperature=max(round(first.temperature - number * config.temperature_step, 6), config.min_temperature),
        top_k=max(first.top_k >> number, config.min_top_k),
        seed=derive_seed(first.seed, 0, number),
    )


@dataclass(frozen=True)
class Decision:
    """What to do with the windows heard so far and not yet passed on.

    ``pass``: hand them on, without the ``drop`` first ones. ``hold``: keep them. ``retry``: nothing was passed on and
    nothing will be, make another take. ``stop``: the take is over, the held ones are its silent tail.
    """

    action: Action
    drop: int = 0


class SilenceGate:
    """Listens to one take. Nothing passes before speech; a pause beyond ``keep_tail_ms`` passes only with what follows.

    Two runs of windows are counted: before the first speech, those held; after it, the current pause.
    """

    def __init__(self, config: SilenceConfig) -> None:
        self._threshold = config.threshold_dbfs
        self._onset = max(1, config.onset_ms // config.window_ms)
        self._keep_lead = config.keep_lead_ms // config.window_ms
        self._max_lead = config.max_lead_ms // config.window_ms
        self._keep_tail = config.keep_tail_ms // config.window_ms
        self._max_pause = config.max_pause_ms // config.window_ms
        self._held = 0
        self._loud_run = 0
        self._pause = 0
        self.silent = True  # nothing has passed yet: at the end of a take this means retry

    def hear(self, level: float) -> Decision:
        """Decide on one more window; ``level`` in dBFS (-inf and NaN are silence)."""
        loud = level > self._threshold
        return self._before_speech(loud) if self.silent else self._after_speech(loud)

    def _before_speech(self, loud: bool) -> Decision:
        self._held += 1
        self._loud_run = self._loud_run + 1 if loud else 0
        if self._loud_run >= self._onset:
            self.silent = False
            return Decision("pass", drop=max(0, self._held - self._loud_run - self._keep_lead))
        return Decision("retry" if self._held >= self._max_lead else "hold")

    def _after_speech(self, loud: bool) -> Decision:
        self._pause = 0 if loud else self._pause + 1
        if self._pause <= self._keep_tail:
            return Decision("pass")
        return Decision("stop" if self._pause >= self._max_pause else "hold")
