"""The silence policy as tables: levels in, decisions out; and the plan of further takes."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csm_core.config import SilenceConfig
from csm_core.silence import SilenceGate, Take, derive_seed, plan_take

# 20 ms windows: 3 loud ones are speech, 2 of silence stay before it, 4 after it; 10 are too many on either side.
CONFIG = SilenceConfig(onset_ms=60, keep_lead_ms=40, max_lead_ms=200, keep_tail_ms=80, max_pause_ms=200)
LOUD, QUIET = -20.0, -70.0


def decide(pattern: str, config: SilenceConfig = CONFIG) -> str:
    """``#`` loud and ``.`` quiet -> ``P`` pass (with the number dropped), ``h`` hold, ``R`` retry, ``S`` stop."""
    gate = SilenceGate(config)
    told = ""
    for window in pattern:
        decision = gate.hear(LOUD if window == "#" else QUIET)
        told += {"pass": f"P{decision.drop or ''}", "hold": "h", "retry": "R", "stop": "S"}[decision.action]
        if decision.action in {"retry", "stop"}:
            break
    return told


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("####", "hhPP"),  # speech from the start: all of it passes
        ("..###", "hhhhP"),  # a short lead stays
        ("......###", "hhhhhhhhP4"),  # of a long one two windows stay
        (".#.##.###", "hhhhhhhhP4"),  # clicks are no speech, and go with the lead
        ("..........", "hhhhhhhhhR"),  # silent for too long
        (".#.#.#.#.#", "hhhhhhhhhR"),  # clicks all the way
        (".......###", "hhhhhhhhhP5"),  # speech in the last moment
        ("###....###", "hhPPPPPPPP"),  # a short pause passes as it comes
        ("###......##", "hhPPPPPhhPP"),  # of a longer one the rest passes with what follows
        ("###..........", "hhPPPPPhhhhhS"),  # an endless tail
        ("###.........#.........#", "hhPPPPPhhhhhPPPPPhhhhhP"),  # each sound starts the pause afresh
    ],
)
def test_decisions(pattern: str, told: str) -> None:
    assert decide(pattern) == told


@pytest.mark.parametrize("level", [-math.inf, math.nan, -50.0, -200.0])
def test_what_is_silence(level: float) -> None:
    gate = SilenceGate(CONFIG)
    assert [gate.hear(level).action for _ in range(10)] == ["hold"] * 9 + ["retry"]
    assert gate.silent


def test_what_is_loud() -> None:
    gate = SilenceGate(CONFIG)
    assert [gate.hear(-49.9).action for _ in range(3)] == ["hold", "hold", "pass"]
    assert not gate.silent


@given(st.lists(st.booleans(), max_size=80))
def test_invariants(loudness: list[bool]) -> None:
    """Nothing is retried after something passed; windows pass in order and at most once; what passed was near sound."""
    gate, held, passed = SilenceGate(CONFIG), [], []
    for index, loud in enumerate(loudness):
        held.append(index)
        decision = gate.hear(LOUD if loud else QUIET)
        if decision.action == "retry":
            assert not passed
            break
        if decision.action == "stop":
            assert passed
            break
        if decision.action == "pass":
            assert 0 <= decision.drop < len(held)
            assert decision.drop == 0 or not passed
            passed += held[decision.drop :]
            held = []
    assert gate.silent == (not passed)
    assert passed == sorted(set(passed))
    if passed:
        assert passed == list(range(passed[0], passed[-1] + 1))  # trimmed at the ends, never cut inside
        assert any(loudness[index] for index in passed[:5])
        quiet_end = len(list(itertools.takewhile(lambda index: not loudness[index], reversed(passed))))
        assert quiet_end <= 4


def first(temperature: float = 0.9, top_k: int = 50, seed: int = 7) -> Take:
    return Take(0, 0, temperature, top_k, seed)


@pytest.mark.parametrize(
    ("temperature", "top_k", "planned"),
    [
        (0.9, 50, [(0.9, 50), (0.7, 25), (0.5, 12), (0.3, 6), (0.3, 5), (0.3, 5)]),
        (0.6, 8, [(0.6, 8), (0.4, 5), (0.3, 5)]),
        (0.2, 3, [(0.2, 3), (0.3, 5), (0.3, 5)]),  # less than the floors was asked: it is had once
        (0.0, 50, [(0.0, 50), (0.3, 25), (0.3, 12)]),  # argmax would make the same take again
        (0.9, 1, [(0.9, 1), (0.7, 5), (0.5, 5)]),  # so would a choice of one
        (2.0, 2051, [(2.0, 2051), (1.8, 1025), (1.6, 512)]),
    ],
)
def test_takes_get_cooler_and_narrower(temperature: float, top_k: int, planned: list[tuple[float, int]]) -> None:
    takes = [plan_take(first(temperature, top_k), number, SilenceConfig()) for number in range(len(planned))]
    assert [(take.temperature, take.top_k) for take in takes] == planned
    assert takes[0] == first(temperature, top_k)
    assert len({take.seed for take in takes}) == len(takes)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 200), st.integers(0, 5))
def test_seeds_stay_64_bit(seed: int, sentence: int, take: int) -> None:
    derived = derive_seed(seed, sentence, take)
    assert -(2**63) <= derived < 2**63
    assert derive_seed(seed, 0, 0) == seed
    assert (derived == seed) == (sentence == take == 0)


def test_seeds_of_one_speech_are_distinct() -> None:
    seeds = {derive_seed(1, sentence, take) for sentence in range(100) for take in range(3)}
    seeds |= {derive_seed(derive_seed(2, sentence, 0), 0, take) for sentence in range(100) for take in range(3)}
    assert len(seeds) == 600


def test_windows_must_tile_a_frame() -> None:
    with pytest.raises(ValueError, match="window_ms"):
        SilenceConfig(window_ms=30)


@pytest.mark.parametrize("floor", [{"min_temperature": 0.0}, {"min_temperature": math.nan}, {"min_top_k": 1}])
def test_the_floors_leave_something_to_draw(floor: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="min_temperature > 0 and min_top_k >= 2"):
        SilenceConfig(**floor)
