"""The judge itself, and (slow) the voice that ships before it."""

import json

import pytest
import torch

import csm_core
from csm_core.model.checkpoint import BUNDLED
from csm_core.train import judge as judging
from csm_core.train.judge import SENTENCES, Judge, Score

SPOKEN = SENTENCES.read_text().splitlines()


def test_edit_distance_counts_words():
    assert judging.edit_distance("a b c".split(), "a b c".split()) == 0
    assert judging.edit_distance("a b c".split(), "a c".split()) == 1
    assert judging.edit_distance("a b c".split(), "x a b d".split()) == 2
    assert judging.edit_distance([], "a b".split()) == 2


def test_there_are_enough_sentences_and_no_two_alike():
    assert len(SPOKEN) >= 40 and len({tuple(judging.words_of(s)) for s in SPOKEN}) == len(SPOKEN)


def test_silence_and_noise_say_nothing():
    judge = Judge(SPOKEN[:3])
    clips = [torch.zeros(24_000), torch.zeros(1), torch.randn(24_000) * 0.1]
    score = judge.score(clips, 24_000)
    assert score.clips == 3 and score.identified < 0.5 and score.word_error >= 0.9


def test_a_word_the_recogniser_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="frobnicated"):
        Judge(["He frobnicated the window."])


@pytest.mark.slow
def test_the_bundled_voice_is_as_good_as_its_card_says_and_the_controls_fail():
    card = json.loads((BUNDLED / "judge.json").read_text())
    judge = Judge(SPOKEN)
    with csm_core.load("bundled", device="cpu") as generator:
        for speaker in (0, 1):
            clips = judging.spoken(generator, SPOKEN, speaker, seed=0)
            score, written = judge.score(clips, generator.sample_rate), Score(**card[f"model, speaker {speaker}"])
            # Another processor rounds otherwise, and a sentence or three of sixty then come out otherwise.
            assert score.identified >= written.identified - 0.05, f"speaker {speaker}: {score}"
            assert score.word_error <= written.word_error + 0.1, f"speaker {speaker}: {score}"
        controls: dict[str, Score] = judging.controls(judge, generator, clips)
    for name, control in controls.items():
        assert control.identified <= 0.1 and control.word_error >= 0.8, f"{name}: {control}"
