"""Voices on disk, and small caches: of voices that were read, and of what the codec made of audio it has seen.

A voice is a folder: ``sample.wav`` (or flac, ogg, mp3), ``transcript.txt`` with exactly what is said in it, and if
wanted ``voice.json`` with ``{"speaker": n}`` (default 0). Knows no codec: the cache is told how to encode.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import torch

from csm_core.audio import read_audio
from csm_core.errors import AudioDecodeError, InvalidInputError
from csm_core.prompt import Segment
from csm_core.text import check_speaker, clean

# A voice of 30 s is 375 frames of 32 codes, 96 kB: the whole cache stays near 6 MB. Its PCM is 2.9 MB.
CACHE_ENTRIES = 64
CACHED_VOICES = 16

SAMPLE_FILES = ("sample.wav", "sample.flac", "sample.ogg", "sample.mp3")
_FILES = (*SAMPLE_FILES, "transcript.txt", "voice.json")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # no dot and no slash: a name cannot leave the voices' folder


@dataclass(frozen=True)
class Voice:
    """A named reference: segments that go first in every prompt and are never evicted."""

    name: str
    segments: tuple[Segment, ...]


def list_voices(voices_dir: Path | None) -> list[str]:
    """Names of the voices in a folder, sorted. No folder, no voices."""
    if voices_dir is None or not voices_dir.is_dir():
        return []
    return sorted(entry.name for entry in voices_dir.iterdir() if _NAME.fullmatch(entry.name) and _sample(entry))


def is_installed(name: str, voices_dir: Path | None) -> bool:
    """Whether a voice of that name is in a folder. A name cannot leave it."""
    return voices_dir is not None and bool(_NAME.fullmatch(name)) and _sample(voices_dir / name) is not None


def _read(folder: Path, sample_rate: int) -> Voice:
    sample = _sample(folder)
    if sample is None:
        raise InvalidInputError(f"The voice folder {folder.name} has no sample.wav (or .flac, .ogg, .mp3).", "voice")
    try:
        audio = read_audio(sample, sample_rate)
    except AudioDecodeError as error:
        raise InvalidInputError(f"The sample of voice {folder.name} cannot be used. {error}", "voice") from error
    return Voice(folder.name, (Segment(_speaker(folder), _transcript(folder), audio),))


def _find(voice: str | Path, voices_dir: Path | None) -> Path:
    if isinstance(voice, Path):
        return voice
    if not isinstance(voice, str) or not _NAME.fullmatch(voice):
        raise InvalidInputError("A voice's name is 1 to 64 letters, digits, '_' or '-'.", "voice")
    if voices_dir is None or not is_installed(voice, voices_dir):
        names = list_voices(voices_dir)
        known = f"the voices here are: {', '.join(names)}" if names else "no voices are installed here"
        raise InvalidInputError(f"There is no voice {voice!r}; {known}.", "voice")
    return voices_dir / voice


def _sample(folder: Path) -> Path | None:
    return next((folder / name for name in SAMPLE_FILES if (folder / name).is_file()), None)


def _transcript(folder: Path) -> str:
    try:
        return clean((folder / "transcript.txt").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        reason = "has no transcript.txt: write what is said in the sample, word for word"
    except UnicodeDecodeError:
        reason = "has a transcript.txt that is not UTF-8"
    except InvalidInputError as error:
        reason = f"has a transcript.txt that cannot be used. {error}"
    raise InvalidInputError(f"The voice folder {folder.name} {reason}", "voice")


def _speaker(folder: Path) -> int:
    settings = folder / "voice.json"
    if not settings.is_file():
        return 0
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"voice.json of voice {folder.name} is not JSON: {error}.", "voice") from error
    if not isinstance(values, dict) or set(values) - {"speaker"}:
        raise InvalidInputError(
            f'voice.json of voice {folder.name} may hold {{"speaker": n}} and nothing else.', "voice"
        )
    return check_speaker(values.get("speaker", 0))


Value = TypeVar("Value")


class _Recent(Generic[Value]):
    """Values by key, the least recently used out first. Any thread may call it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``: remembered, or made and remembered. What ``make`` raises is not."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()  # outside the lock: two threads may both make a new one, none waits for another's
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._capacity:
                self._values.popitem(last=False)
        return value


class VoiceCache:
    """Voices with their audio at ``sample_rate`` Hz; one whose files are as they were is not read again.

    A 30 s sample of 48 kHz takes 65 ms to read and resample on one core, at the model's rate 10 ms.
    """

    def __init__(self, sample_rate: int, capacity: int = CACHED_VOICES) -> None:
        self._sample_rate = sample_rate
        self._voices: _Recent[Voice] = _Recent(capacity)

    def get(self, voice: str | Path, voices_dir: Path | None) -> Voice:
        """A ``str`` is a name inside ``voices_dir`` and nothing else, so it may come from a caller of an endpoint; a
        ``Path`` is the folder itself, for whoever owns the machine. Raises InvalidInputError that says what is missing.
        """
        folder = _find(voice, voices_dir)
        key = folder, *(_stamp(folder / name) for name in _FILES)
        return self._voices.get(key, lambda: _read(folder, self._sample_rate))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content: time, size, and the inode, for one that was moved here with an old time."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class CodesCache:
    """Codes of audio seen before, keyed by content, so a changed file is a new entry.

    One generator owns one cache (codes of another codec would be noise); its callers may be on several threads.
    """

    def __init__(self, capacity: int = CACHE_ENTRIES) -> None:
        self._codes: _Recent[torch.Tensor] = _Recent(capacity)

    def __len__(self) -> int:
        return len(self._codes)

    def get(self, audio: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Codes ``[frames, K]`` of PCM ``[samples]``: remembered, or made by ``encode`` and remembered."""
        samples = audio.detach().to("cpu", torch.float32).contiguous()
        key = hashlib.blake2b(samples.numpy().tobytes(), digest_size=16).digest()
        return self._codes.get(key, lambda: encode(audio))
