"""Transcripts as subtitles, the languages people write, and where long audio and words are cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_core.asr import Passage, Transcript, srt, vtt
from csm_core.asr.pauses import PASSAGE_SECONDS, Word, passages, split_at_pauses, without_silence
from csm_core.asr.transcript import check_language
from csm_core.errors import InvalidInputError, UnsupportedLanguageError

TWO = Transcript(
    "one two three", "en", 3700.5, (Passage(0.0, 1.25, "one two"), Passage(3661.0019, 3662.9996, "three\n\n--> 4"))
)


def test_srt_is_as_players_read_it() -> None:
    assert srt(TWO) == ("1\n00:00:00,000 --> 00:00:01,250\none two\n\n2\n01:01:01,002 --> 01:01:03,000\nthree -> 4\n")


def test_vtt_is_as_browsers_read_it() -> None:
    assert vtt(TWO) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\none two\n\n01:01:01.002 --> 01:01:03.000\nthree -> 4\n"
    )


def test_no_speech_is_an_empty_document() -> None:
    silent = Transcript("", "en", 2.0, ())
    assert (srt(silent), vtt(silent)) == ("", "WEBVTT\n")


@pytest.mark.parametrize(
    ("said", "code"),
    [("en", "en"), ("EN", "en"), ("en-US", "en"), ("en_GB", "en"), (" en ", "en"), (None, None), ("", None)],
)
def test_languages_as_people_write_them(said: str | None, code: str | None) -> None:
    assert check_language(said, {"en", "de"}, "It") == code


@pytest.mark.parametrize("said", ["fr", "english!", "../en", "e" * 10_000])
def test_another_language_is_an_error_that_lists_the_known_ones(said: str) -> None:
    with pytest.raises(UnsupportedLanguageError, match="knows: de, en") as caught:
        check_language(said, {"en", "de"}, "It")
    assert isinstance(caught.value, InvalidInputError)
    assert (caught.value.param, caught.value.code) == ("language", "unsupported_language")
    assert len(str(caught.value)) < 200


def test_long_audio_is_cut_in_its_pauses() -> None:
    rate = 1000
    loud = torch.sin(torch.arange(30 * rate) * 0.7)
    for start in (7.0, 8.0, 15.0, 23.5):  # pauses of 0.4 s; 8.0 is only a softer one
        loud[round(start * rate) : round((start + 0.4) * rate)] *= 0.2 if start == 8.0 else 0.001
    borders = split_at_pauses(loud, rate, 10.0)
    assert [round(stop / rate, 1) for _, stop in borders[:-1]] == pytest.approx([7.2, 15.2, 23.7], abs=0.11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 20_000), st.sampled_from([2.0, 5.0, 30.0]), st.integers(0, 3))
def test_pieces_are_all_of_it_and_never_too_long(samples: int, seconds: float, seed: int) -> None:
    pcm = torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * (seed > 0)
    borders = split_at_pauses(pcm, 1000, seconds)
    assert borders[0][0] == 0
    assert borders[-1][1] == samples
    assert all(a[1] == b[0] for a, b in itertools.pairwise(borders))
    assert all(0 < stop - start <= seconds * 1000 for start, stop in borders[: samples and None])


def test_silence_around_sound_is_found() -> None:
    pcm = torch.zeros(3000)
    assert without_silence(pcm, 1000) == without_silence(pcm[:5], 1000) == without_silence(pcm[:0], 1000) == (0, 0)
    pcm[1230:1900] = 0.5
    pcm[:1000] = 0.004  # a hum that much softer is none
    assert without_silence(pcm, 1000) == (1220, 1900)
    assert without_silence(pcm[:1000], 1000) == (0, 1000)


def test_a_pause_or_much_time_begins_a_passage() -> None:
    words = [Word("a", 0.0, 0.4), Word("b", 0.5, 0.9), Word("c", 1.6, 2.0)]
    assert passages(words) == (Passage(0.0, 0.9, "a b"), Passage(1.6, 2.0, "c"))
    steady = passages(Word("x", i * 0.5, i * 0.5 + 0.45) for i in range(100))
    assert sum(len(passage.text.split()) for passage in steady) == 100
    assert max(passage.end - passage.start for passage in steady) <= PASSAGE_SECONDS
    assert passages([]) == ()
