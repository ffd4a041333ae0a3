"""What was said and when: the result of every transcriber, the form they share, and its two subtitle formats."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from csm_core.errors import UnsupportedLanguageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Passage:
    """Some words without a long pause between them; times in seconds from the start of the audio."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """``language`` as ISO 639-1 ("en"). ``segments`` in the order of time; no speech, no segments and an empty text."""

    text: str
    language: str
    duration_seconds: float
    segments: tuple[Passage, ...]


class Transcriber(Protocol):
    """Any thread may call it, several at once too."""

    def transcribe(self, pcm: "Tensor", sample_rate: int, language: str | None = None) -> Transcript:
        """Mono PCM ``[samples]`` at ``sample_rate`` Hz -> what is said in it. ``language``: a code, None to find out.

        Raises UnsupportedLanguageError before any work, TranscriptionError when it fails.
        """
        ...


def check_language(language: str | None, known: Collection[str], who: str) -> str | None:
    """ "en-US", "EN" or "en" -> "en"; none or empty -> None. Raises UnsupportedLanguageError for one not ``known``."""
    if language is None or not language.strip():
        return None
    code = re.split("[-_]", language.strip().lower())[0]
    if code not in known:
        listed = ", ".join(sorted(known))
        raise UnsupportedLanguageError(f"{who} does not know the language {language[:40]!r}; it knows: {listed}.")
    return code


def srt(transcript: Transcript) -> str:
    """SubRip: numbered, comma before the milliseconds."""
    cues = (f"{number}\n{times}\n{text}\n" for number, times, text in _cues(transcript, ","))
    return "\n".join(cues)


def vtt(transcript: Transcript) -> str:
    """WebVTT."""
    return "\n".join(["WEBVTT\n", *(f"{times}\n{text}\n" for _, times, text in _cues(transcript, "."))])


def _cues(transcript: Transcript, point: str) -> Iterator[tuple[int, str, str]]:
    for number, passage in enumerate(transcript.segments, 1):
        # An arrow or an empty line would end the cue.
        text = " ".join(passage.text.replace("-->", "->").split())
        yield number, f"{_clock(passage.start, point)} --> {_clock(passage.end, point)}", text


def _clock(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(max(0.0, seconds) * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{milliseconds:03}"
