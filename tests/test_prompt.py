"""The context budget as a policy on plain lengths, and the frames that a prompt is made of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_core.errors import InvalidInputError, PromptTooLongError
from csm_core.model.csm import ABSENT
from csm_core.prompt import (
    SAME_SPEAKER_LEAD,
    EncodedSegment,
    Segment,
    Turn,
    build_prompt,
    fit_context,
    segment_length,
)

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
PCM = torch.zeros(100)
TURNS = st.lists(st.builds(Turn, st.integers(1, 300), st.integers(0, 2), st.booleans()), max_size=12)


def test_segment_has_the_originals_order() -> None:
    segment = Segment(1, "Hello.", PCM)
    assert (segment.speaker, segment.text) == (1, "Hello.")
    assert segment.audio is PCM


@pytest.mark.parametrize(
    ("speaker", "text", "audio", "sentence"),
    [
        ("x", "a", PCM, "speaker"),
        (-1, "a", PCM, "speaker"),
        (True, "a", PCM, "speaker"),
        (1.0, "a", PCM, "speaker"),
        (0, None, PCM, "text must be a string"),
        (0, "a", [0.0, 0.1], "tensor of floats"),
        (0, "a", torch.zeros(100, dtype=torch.int16), "tensor of floats"),
        (0, "a", torch.zeros(1, 100), r"mono \[samples\] and not empty; it is \(1, 100\)"),
        (0, "a", torch.zeros(0), "not empty"),
        (0, "a", torch.tensor([0.0, math.nan]), "NaN"),
        (0, "a", torch.tensor([0.0, -math.inf]), "infinite"),
    ],
)
def test_a_segment_that_is_no_turn_is_refused(speaker, text, audio, sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        Segment(speaker, text, audio)


@SETTINGS
@given(TURNS, st.integers(1, 100), st.integers(0, 300), st.integers(0, 2), st.integers(1, 1500))
def test_the_budget_holds(turns: list[Turn], text: int, answer: int, speaker: int, window: int) -> None:
    voice = {i for i, turn in enumerate(turns) if turn.is_voice}
    needed = text + answer + sum(turns[i].length for i in voice)
    if needed > window:
        with pytest.raises(PromptTooLongError) as caught:
            fit_context(turns, text, answer, speaker, window)
        assert caught.value.excess == needed - window
        return
    kept = fit_context(turns, text, answer, speaker, window)
    assert kept == sorted(set(kept))  # chronological, each once
    assert voice <= set(kept)
    free = window - text - answer - sum(turns[i].length for i in kept)
    assert free >= 0
    dropped = [i for i in range(len(turns)) if i not in kept]
    assert all(turns[i].length > free for i in dropped)  # nothing goes that would still fit
    others = [i for i in range(len(turns)) if i not in voice]
    if others and turns[others[-1]].length <= window - needed:
        assert others[-1] in kept  # the turn that is answered


@SETTINGS
@given(TURNS, st.integers(0, 2), st.integers(0, 1500))
def test_a_turn_only_goes_for_turns_that_matter_more(turns: list[Turn], speaker: int, window: int) -> None:
    turns = [turn._replace(is_voice=False, length=10) for turn in turns]  # equal lengths: relevance alone decides
    kept = fit_context(turns, 0, 0, speaker, window)
    assert len(kept) == min(len(turns), window // 10)
    for i in range(len(turns)):
        for j in range(i + 1, len(turns)):
            if turns[i].speaker != speaker or turns[j].speaker == speaker:
                assert i not in kept or j in kept  # the newer one, unless the older one is by who speaks next


def test_the_rule_in_one_picture() -> None:
    turns = [Turn(10, 0), Turn(10, 0), Turn(10, 1), Turn(10, 0), Turn(10, 1), Turn(10, 1)]
    assert SAME_SPEAKER_LEAD == 2
    order = [set(fit_context(turns, 0, 0, 0, 10 * n)) for n in range(7)]
    added = [(order[n + 1] - order[n]).pop() for n in range(6)]
    # newest; then ages 1, 2, 3, 4, 5 where speaker 0's count as 0 (2), 2 (4), 3 (5): ties go to the newer
    assert added == [5, 3, 4, 1, 2, 0]


def test_the_newest_turn_goes_before_any_other() -> None:
    assert fit_context([Turn(10, 0), Turn(10, 1)], 0, 0, 0, 10) == [1]  # also when the one before is by who speaks next


def test_the_voice_is_never_evicted_and_holes_are_filled() -> None:
    turns = [Turn(100, 0, is_voice=True), Turn(10, 1), Turn(500, 1), Turn(20, 1)]
    assert fit_context(turns, 20, 50, 0, 210) == [0, 1, 3]
    assert fit_context(turns, 20, 50, 0, 199) == [0, 3]
    assert fit_context(turns, 20, 50, 0, 170) == [0]


def test_only_the_room_that_the_answer_needs_is_reserved() -> None:
    turns = [Turn(1000, 1), Turn(900, 0)]
    assert fit_context(turns, 20, 100, 0, 2048) == [0, 1]
    assert fit_context(turns, 20, 1125, 0, 2048) == [1]  # the original reserves 90 s whatever is said


@pytest.mark.parametrize(
    ("turns", "text", "sentence", "param"),
    [
        ([Turn(1500, 0, True)], 500, "Shorten the text or the voice sample", "voice"),
        ([Turn(5, 0)], 2000, r"Shorten the text or ask for a shorter answer\.", "text"),
    ],
)
def test_what_cannot_fit_says_by_how_much(turns: list[Turn], text: int, sentence: str, param: str) -> None:
    with pytest.raises(PromptTooLongError, match=sentence) as caught:
        fit_context(turns, text, 125, 0, 2048)
    assert caught.value.excess == text + 125 + sum(t.length for t in turns if t.is_voice) - 2048
    assert str(caught.value.excess) in str(caught.value)
    assert caught.value.param == param


def test_the_layout_frame_by_frame() -> None:
    codes = torch.tensor([[3, 4], [5, 6]])
    frames = build_prompt([EncodedSegment([1, 40, 2], codes, speaker=0)], [1, 50, 51, 2], num_codebooks=2)
    absent = ABSENT
    assert frames.dtype == torch.int64
    assert frames.tolist() == [
        *([absent, absent, token] for token in (1, 40, 2)),
        [3, 4, absent],
        [5, 6, absent],
        [0, 0, absent],  # EOS frame
        *([absent, absent, token] for token in (1, 50, 51, 2)),
    ]


def test_the_prompt_is_as_long_as_the_budget_says() -> None:
    segments = [EncodedSegment(range(n), torch.ones(3 * n, 4, dtype=torch.int64), 0) for n in (1, 2, 5)]
    frames = build_prompt(segments, [7], num_codebooks=4)
    assert len(frames) == sum(segment.turn.length for segment in segments) + 1
    assert segments[1].turn == Turn(segment_length(2, 6), 0, False)


def test_a_prompt_without_context_is_its_text() -> None:
    assert build_prompt([], [9, 8], num_codebooks=3).tolist() == [[ABSENT] * 3 + [9], [ABSENT] * 3 + [8]]
