"""The embedded recogniser in its own process. It understands half of what the bundled voice says, so what is asked of
it freely is little, and what is asked among few sentences is exact. A clip costs it a second or two of CPU time.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import csm_core
from csm_core.asr.sphinx import SphinxTranscriber
from csm_core.errors import TranscriptionError, UnsupportedLanguageError

TRAIN = "The train leaves at half past seven."
KEYS = "He could not find his keys this morning."
OTHERS = ["Our team won the game last night.", "I would like a cup of tea with milk."]
RATE = 24_000


def said(sentence: str) -> str:
    return sentence.lower().strip(".")


@pytest.fixture(scope="module")
def clips() -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    with csm_core.load("bundled", device="cpu") as generator:
        return {text: generator.generate(text, seed=seed) for text, seed in ((TRAIN, 0), (KEYS, 8))}


@pytest.fixture(scope="module")
def among_four() -> Iterator[SphinxTranscriber]:
    transcriber = SphinxTranscriber(phrases=[TRAIN, KEYS, *OTHERS])
    yield transcriber
    transcriber.close()


def test_it_hears_which_of_four_sentences_was_said(clips, among_four) -> None:
    with ThreadPoolExecutor(3) as threads:  # at once: each caller gets its own answer
        heard = list(threads.map(lambda text: among_four.transcribe(clips[text], RATE, "en"), [TRAIN, KEYS, TRAIN]))
    assert [transcript.text for transcript in heard] == [said(TRAIN), said(KEYS), said(TRAIN)]


def test_it_says_when_it_was_said(clips, among_four) -> None:
    pause = torch.zeros(2 * RATE)
    both = torch.cat([pause, clips[TRAIN], pause])
    transcript = among_four.transcribe(both, RATE, None)
    assert transcript.text == said(TRAIN)
    assert transcript.language == "en"
    assert transcript.duration_seconds == pytest.approx(len(both) / RATE)
    assert transcript.segments[0].start == pytest.approx(2.0, abs=0.5)
    assert transcript.segments[-1].end == pytest.approx(2 + len(clips[TRAIN]) / RATE, abs=0.7)
    assert " ".join(passage.text for passage in transcript.segments) == transcript.text


def test_long_audio_is_heard_piece_by_piece(clips, among_four) -> None:
    """25 s, more than one piece: a sentence near the start and one near the end."""
    gap = torch.zeros(25 * RATE - len(clips[TRAIN]) - len(clips[KEYS]))
    transcript = among_four.transcribe(torch.cat([clips[TRAIN], gap, clips[KEYS]]), RATE)
    assert transcript.text == f"{said(TRAIN)} {said(KEYS)}"
    assert transcript.segments[-1].end == pytest.approx(25, abs=0.7)


def test_freely_it_hears_some_of_it(clips) -> None:
    transcriber = SphinxTranscriber()
    try:
        transcript = transcriber.transcribe(clips[TRAIN], RATE)
    finally:
        transcriber.close()
    assert len(set(transcript.text.split()) & set(said(TRAIN).split())) >= 2
    assert 3 <= len(transcript.text.split()) <= 15
    times = [moment for passage in transcript.segments for moment in (passage.start, passage.end)]
    assert times == sorted(times)
    assert times[-1] <= transcript.duration_seconds + 0.5


@pytest.mark.parametrize("pcm", [torch.zeros(0), torch.zeros(100), torch.zeros(RATE)], ids=["none", "little", "silent"])
def test_nothing_is_heard_in_silence(among_four, pcm: torch.Tensor) -> None:
    transcript = among_four.transcribe(pcm, RATE)
    assert (transcript.text, transcript.segments) == ("", ())
    assert transcript.duration_seconds == len(pcm) / RATE


def test_another_language_is_refused_before_any_work() -> None:
    transcriber = SphinxTranscriber()
    with pytest.raises(UnsupportedLanguageError, match="knows: en"):
        transcriber.transcribe(torch.zeros(RATE), RATE, "de")
    assert transcriber._worker is None  # lazily: nothing was started


def test_it_is_killed_when_it_takes_too_long_and_starts_again(clips) -> None:
    transcriber = SphinxTranscriber(phrases=[TRAIN, KEYS], patience=-10 * 3600.0)  # the deadline is past at once
    with pytest.raises(TranscriptionError, match="too long"):
        transcriber.transcribe(clips[TRAIN], RATE)
    transcriber._patience = 60.0
    assert transcriber.transcribe(clips[TRAIN], RATE).text == said(TRAIN)
    worker = transcriber._worker
    worker.kill()  # as the kernel does when memory is short
    worker.wait()
    with pytest.raises(TranscriptionError, match="stopped"):
        transcriber.transcribe(clips[TRAIN], RATE)
    transcriber.close()


def test_others_run_while_it_listens(clips, among_four) -> None:
    """Its search holds the lock of the interpreter it runs in: not ours."""
    stalls, stop = [], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not stop.wait(0.005):
            now = time.monotonic()
            stalls.append(now - last)
            last = now

    ticking = threading.Thread(target=tick)
    ticking.start()
    began = time.monotonic()
    among_four.transcribe(clips[KEYS].repeat(3), RATE)
    took = time.monotonic() - began
    stop.set()
    ticking.join()
    assert len(stalls) > 5
    assert max(stalls) < max(0.5 * took, 0.2)


def test_its_process_ends_with_it(clips) -> None:
    transcriber = SphinxTranscriber(phrases=[TRAIN])
    transcriber.transcribe(clips[TRAIN], RATE)
    process = transcriber._worker.pid
    del transcriber
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
