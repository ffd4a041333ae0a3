"""Whole clips: bytes of the common sound formats -> mono float32 PCM tensors ``[samples]``, and 16-bit WAV out.

Nothing that a file says about itself is believed: sizes are counted while reading, and every limit is checked before
the work that it bounds. Knows no codec, no model and no HTTP. Formats are libsndfile's, through soundfile.
"""

import base64
import binascii
import io
import re
import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio.functional

from csm_core.errors import AudioDecodeError, InvalidInputError

MAX_SECONDS = 60.0
MAX_BYTES = 25 * 2**20  # two minutes of 48 kHz stereo 16-bit WAV
MAX_CHANNELS = 8
SAMPLE_RATES = (4_000, 192_000)
SILENCE_PEAK = 1e-3  # -60 dBFS, below the noise floor of a 16-bit recording made with care

# libsndfile also opens forty formats that nobody sends and few have fuzzed: these are the ones in use.
CONTAINERS = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3"}

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")


def pcm16_bytes(pcm: torch.Tensor) -> bytes:
    """Mono PCM ``[samples]`` in -1..1 as little-endian signed 16-bit bytes; louder samples are clipped, never wrapped.

    Exact for audio that was 16-bit before. Raises InvalidInputError for another shape or NaN/infinity.
    """
    if pcm.ndim != 1:
        raise InvalidInputError(f"Audio must be mono [samples], not of shape {tuple(pcm.shape)}.", "audio")
    samples = pcm.detach().to("cpu", torch.float32)
    if not torch.isfinite(samples).all():
        raise InvalidInputError("Audio holds NaN or infinite samples and cannot be saved.", "audio")
    scaled = (samples * 32768.0).round().clamp(-32768, 32767)
    return scaled.numpy().astype("<i2").tobytes()


def encode_wav(pcm: torch.Tensor, sample_rate: int) -> bytes:
    """A complete 16-bit mono WAV file of PCM ``[samples]`` at ``sample_rate`` Hz. Raises as ``pcm16_bytes``."""
    frames = pcm16_bytes(pcm)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(frames)
    return buffer.getvalue()


def wav_base64(pcm: torch.Tensor, sample_rate: int) -> str:
    """``encode_wav`` as base64 text, for JSON."""
    return base64.b64encode(encode_wav(pcm, sample_rate)).decode("ascii")


def write_wav(path: str | Path, pcm: torch.Tensor, sample_rate: int) -> None:
    """Save PCM ``[samples]`` as a 16-bit mono WAV file."""
    Path(path).write_bytes(encode_wav(pcm, sample_rate))


class WavWriter:
    """Writes chunks into a WAV as they come. There is no file before the first sound."""

    def __init__(self, path: Path, sample_rate: int) -> None:
        self._path, self._sample_rate = path, sample_rate
        self._file: wave.Wave_write | None = None

    def hear(self, chunk: torch.Tensor) -> None:
        if self._file is None:
            self._file = wave.open(str(self._path), "wb")  # noqa: SIM115 -- open for the length of the stream
            self._file.setnchannels(1)
            self._file.setsampwidth(2)
            self._file.setframerate(self._sample_rate)
        self._file.writeframes(pcm16_bytes(chunk))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_audio(path: str | Path, sample_rate: int, max_seconds: float = MAX_SECONDS) -> torch.Tensor:
    """Read a sound file as ``decode_audio`` does. Raises AudioDecodeError, also when the file is not there."""
    file = Path(path)
    if not file.is_file():
        raise AudioDecodeError(f"There is no audio file {file}.", "audio")
    if file.stat().st_size > MAX_BYTES:
        raise AudioDecodeError(f"{file.name} is too large: at most {MAX_BYTES:,} bytes are read.", "audio")
    return decode_audio(file.read_bytes(), sample_rate, max_seconds)


def decode_base64_audio(
    text: str, sample_rate: int, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> torch.Tensor:
    """``decode_audio`` of base64 text. A ``data:`` URL prefix and line breaks are allowed. Raises AudioDecodeError."""
    if not isinstance(text, str):
        raise AudioDecodeError(f"Audio must be base64 text, not {type(text).__name__}.", "audio")
    # 4 characters for 3 bytes, a line break of 2 after each 64, a prefix: checked before anything is copied.
    if len(text) > max_bytes * 4 // 3 * 66 // 64 + 256:
        raise AudioDecodeError(f"The base64 audio is too long: at most {max_bytes:,} bytes of audio are read.", "audio")
    prefix = _DATA_URL.match(text)
    packed = "".join(text[prefix.end() if prefix else 0 :].split())
    if stray := _NOT_BASE64.search(packed):
        raise AudioDecodeError(
            f"The base64 audio has a character that is not base64: {stray[0]!a} (number {stray.start() + 1}).", "audio"
        )
    try:
        data = base64.b64decode(packed, validate=True)
    except binascii.Error as error:
        raise AudioDecodeError(
            "The base64 audio is cut off or its '=' padding is wrong: send all of it.", "audio"
        ) from error
    return decode_audio(data, sample_rate, max_seconds, max_bytes)


def decode_audio(
    data: bytes, sample_rate: int, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> torch.Tensor:
    """The bytes of a wav, flac, ogg (vorbis, opus), mp3, aiff, au or caf file -> mono float32 ``[samples]`` at
    ``sample_rate`` Hz, full scale +-1.

    Raises AudioDecodeError for bytes that are no audio; more than ``max_bytes``, or ``max_seconds`` as counted while
    reading; a rate outside 4 to 192 kHz; more than 8 channels; NaN or infinite samples; a clip that is empty or silent.
    """
    if len(data) > max_bytes:
        raise AudioDecodeError(f"The audio is too large: {len(data):,} bytes, at most {max_bytes:,} are read.", "audio")
    try:
        with soundfile.SoundFile(_Bytes(data)) as file:
            _check_header(file)
            rate = file.samplerate
            pcm = _read_mono(file, max_seconds)
    except soundfile.LibsndfileError as error:
        raise AudioDecodeError(
            "These bytes are not audio that can be read: send a complete wav, flac, ogg or mp3 file.", "audio"
        ) from error
    return usable(pcm, rate, sample_rate)


def usable(pcm: torch.Tensor, source_rate: int, sample_rate: int) -> torch.Tensor:
    """The end of every decoder: PCM ``[samples]`` at ``source_rate`` Hz -> at ``sample_rate`` Hz, within full scale.

    Raises AudioDecodeError for a clip that is empty or silent.
    """
    peak = float(pcm.abs().max()) if pcm.numel() else 0.0
    if peak < SILENCE_PEAK:
        what = "silent (nothing above -60 dBFS)" if pcm.numel() else "empty"
        raise AudioDecodeError(f"The audio is {what}: send a clip with speech in it.", "audio")
    if peak > 1:  # float files may pass full scale; some hold 16-bit integers as floats
        pcm = pcm / peak
    return resample(pcm, source_rate, sample_rate)


class _Bytes(io.BytesIO):
    """Damaged headers make libsndfile seek before the start; raising in its callback would print a traceback."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _check_header(file: soundfile.SoundFile) -> None:
    if file.format not in CONTAINERS:
        raise AudioDecodeError(f"Audio in the format {file.format} is not read: send wav, flac, ogg or mp3.", "audio")
    check_shape(file.samplerate, file.channels)


def check_shape(sample_rate: int, channels: int) -> None:
    """What a file says of itself, before memory is taken for it. Raises AudioDecodeError."""
    low, high = SAMPLE_RATES
    if not low <= sample_rate <= high:
        raise AudioDecodeError(
            f"The audio says its sample rate is {sample_rate} Hz; {low} to {high} Hz can be used.", "audio"
        )
    if channels > MAX_CHANNELS:
        raise AudioDecodeError(f"The audio has {channels} channels; at most {MAX_CHANNELS} are read.", "audio")


def too_long(max_seconds: float) -> AudioDecodeError:
    return AudioDecodeError(f"The audio is longer than {max_seconds:g} s: send a shorter clip.", "audio")


def _read_mono(file: soundfile.SoundFile, max_seconds: float) -> torch.Tensor:
    """Second by second, so that a small file that unpacks to hours (opus: 232 times its size) stops at the limit."""
    limit = int(max_seconds * file.samplerate)
    blocks: list[npt.NDArray[np.float32]] = []
    total = 0
    while len(block := file.read(frames=file.samplerate, dtype="float32", always_2d=True)):
        total += len(block)
        if total > limit:
            raise too_long(max_seconds)
        if not np.isfinite(block).all():
            raise AudioDecodeError("The audio holds NaN or infinite samples.", "audio")
        blocks.append(block.mean(axis=1, dtype=np.float64).astype(np.float32))  # float32 sums of huge floats overflow
    return torch.from_numpy(np.concatenate(blocks)) if blocks else torch.zeros(0)


def resample(pcm: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """PCM ``[samples]`` at ``source`` Hz -> at ``target`` Hz."""
    if not len(pcm):
        return pcm
    # torchaudio's filter has source * target / gcd^2 taps: 44,101 -> 24,000 Hz would take 4 GB. Every rate in use is a
    # multiple of 25 Hz; an odd one is taken as the nearest multiple, which shifts its pitch by 0.3 % at most.
    nearest = 25 * round(source / 25)
    resampled: torch.Tensor = torchaudio.functional.resample(pcm, nearest, target)
    return resampled
