"""CMU pocketsphinx (the extra ``asr``): English, on any CPU, with a model of 37 MB inside its package. It is rough: of
what the bundled voice says it hears every second word wrong. For transcripts that are read, take Whisper.

It works in a process of its own (``sphinx_worker``), because it holds Python's lock while it searches: 18 s for 4 s of
noise on a busy machine, in which no other thread of a server would speak.
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Lock, Timer

import torch

from csm_core.asr.pauses import Word, passages, split_at_pauses, without_silence
from csm_core.asr.transcript import Transcript, check_language
from csm_core.audio import pcm16_bytes, resample
from csm_core.errors import TranscriptionError

LANGUAGES = ("en",)
RATE = 16_000  # of its acoustic model
PIECE_SECONDS = 20.0  # its search slows down with length, and its pace is one piece's
LEVEL = 0.7  # peak that a clip is brought to
MARGIN_SECONDS = 0.4  # of near-silence around a piece: with none, first and last words are dropped; with seconds, all
DITHER = 1e-4  # of noise: exact zeros have no logarithm

_WORKER = Path(__file__).with_name("sphinx_worker.py")


class SphinxTranscriber:
    """One recogniser; callers on several threads take turns. It starts with the first clip (half a second)."""

    def __init__(self, phrases: Sequence[str] = (), patience: float = 60.0) -> None:
        """With ``phrases`` the only answers are these (words of its dictionary, without digits) or nothing.

        A piece may take ``patience`` seconds, and ten times its length on top.
        """
        self._arguments = [json.dumps(list(phrases))]
        self._patience = patience
        self._lock = Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def transcribe(self, pcm: torch.Tensor, sample_rate: int, language: str | None = None) -> Transcript:
        """See Transcriber. Text comes in lower case and without punctuation."""
        check_language(language, LANGUAGES, "pocketsphinx")
        wave = resample(pcm.detach().to("cpu", torch.float32), sample_rate, RATE)
        words: list[Word] = []
        for start, stop in split_at_pauses(wave, RATE, PIECE_SECONDS):
            first, last = without_silence(wave[start:stop], RATE)
            shift = (start + first) / RATE - MARGIN_SECONDS
            for text, begin, end in self._recognise(_prepared(wave[start + first : start + last])) if last else ():
                words.append(Word(text, max(0.0, round(begin + shift, 2)), max(0.0, round(end + shift, 2))))
        text = " ".join(word.text for word in words)
        return Transcript(text, "en", len(pcm) / sample_rate, passages(words))

    def close(self) -> None:
        """End the process. It also ends with this object and with this program; another clip starts it again."""
        with self._lock:
            self._stop()

    def _recognise(self, pcm: bytes) -> list[tuple[str, float, float]]:
        with self._lock:
            worker = self._worker = self._worker or self._start()
            assert worker.stdin is not None
            assert worker.stdout is not None
            deadline = Timer(self._patience + 10 * len(pcm) / (2 * RATE), worker.kill)
            deadline.start()
            try:
                worker.stdin.write(b"%d\n" % len(pcm) + pcm)
                worker.stdin.flush()
                answer = worker.stdout.readline()
            except OSError:  # it died while it was written to
                answer = b""
            finally:
                deadline.cancel()
            if not answer:
                self._stop()
                raise TranscriptionError("The speech recogniser stopped or took too long: try a shorter, clearer clip.")
        return [(text, begin, end) for text, begin, end in json.loads(answer)]

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the script, where a module is called whisper, stays out of its path. A session of its own:
        # what the terminal or a supervisor sends to a whole group ends it only after the last answer.
        command = [sys.executable, "-P", str(_WORKER), *self._arguments]
        worker = subprocess.Popen(  # noqa: S603  our own script, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, worker)
        return worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker = None
            self._end()


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.communicate()


def _prepared(pcm: torch.Tensor) -> bytes:
    margin = round(MARGIN_SECONDS * RATE)
    wave = torch.nn.functional.pad(pcm * (LEVEL / pcm.abs().max().clamp_min(1e-6)), (margin, margin))
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0))
    return pcm16_bytes(wave + DITHER * noise)
