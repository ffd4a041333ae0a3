"""Speech as bytes of the six formats of the speech API, whole or while it is spoken. Needs PyAV (the extra ``serve``).

Every format starts from the same 16-bit samples, so wav, pcm and flac carry identical audio and the lossy ones encode
it. wav and pcm are written by hand, the others by FFmpeg. Knows no HTTP.
"""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType

import av
import numpy as np
import torch

from csm_core.audio.files import encode_wav, pcm16_bytes
from csm_core.errors import InvalidInputError

FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "mp3": "audio/mpeg",
        "opus": "audio/opus",
        "aac": "audio/aac",
        "flac": "audio/flac",
        "wav": "audio/wav",
        "pcm": "audio/pcm",
    }
)


@dataclass(frozen=True)
class Encoding:
    """How FFmpeg writes a format."""

    container: str
    codec: str
    sample_format: str
    bit_rate: int | None = None  # bits per second, of mono speech
    codec_options: Mapping[str, str] = field(default_factory=dict)
    container_options: Mapping[str, str] = field(default_factory=dict)


ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {
        "mp3": Encoding(
            container="mp3",
            codec="libmp3lame",
            sample_format="s16p",
            bit_rate=96_000,
            codec_options={"reservoir": "0"},  # a frame needs no earlier one: it leaves sooner, and may be lost alone
            container_options={"id3v2_version": "0"},
        ),
        "opus": Encoding(
            container="ogg",
            codec="libopus",
            sample_format="s16",
            bit_rate=48_000,
            container_options={"page_duration": "20000"},  # µs; FFmpeg's own of 1 s would hold the first sound back
        ),
        "aac": Encoding(container="adts", codec="aac", sample_format="fltp", bit_rate=96_000),
        "flac": Encoding(
            container="flac",
            codec="flac",
            sample_format="s16",
            container_options={"metadata_header_padding": "0"},  # 8 KB that no listener needs
        ),
    }
)
UNKNOWN_SIZE = 0xFFFFFFFF  # what players take for "until the end" in a streamed WAV


def check_format(name: str) -> str:
    """``name`` if it is one of FORMATS, else InvalidInputError."""
    if name not in FORMATS:
        raise InvalidInputError(f"There is no format {name!r}; there are {', '.join(FORMATS)}.", "response_format")
    return name


def encode_audio(pcm: torch.Tensor, sample_rate: int, format: str) -> bytes:  # noqa: A002  its name in the API
    """A complete file of PCM ``[samples]`` at ``sample_rate`` Hz; its header says its true length where it has one.

    Raises InvalidInputError for an unknown format, a rate that the format cannot carry, and as ``pcm16_bytes``.
    """
    if check_format(format) == "wav":
        return encode_wav(pcm, sample_rate)
    samples = pcm16_bytes(pcm)
    if format == "pcm":
        return samples
    file = io.BytesIO()
    track = _Track(ENCODINGS[format], sample_rate, file)
    track.encode(samples)
    track.close()
    return file.getvalue()


class StreamEncoder:
    """Encodes PCM while it is spoken: ``feed`` chunk after chunk, then ``finish`` once. For one thread at a time.

    What ``feed`` cannot hand out yet (an incomplete codec frame) comes with the next one or with ``finish``: the tail
    is complete only after that. A stream that is given up needs no ``finish``.
    """

    def __init__(self, format: str, sample_rate: int) -> None:  # noqa: A002
        """Raises InvalidInputError for an unknown format or a rate in Hz that it cannot carry."""
        self._outlet = _Outlet()
        self._track: _Track | None = None
        self._finished = False
        if check_format(format) == "wav":
            self._outlet.write(streamed_wav_header(sample_rate))
        elif format != "pcm":
            self._track = _Track(ENCODINGS[format], sample_rate, self._outlet)

    def feed(self, pcm: torch.Tensor) -> bytes:
        """The bytes that ``[samples]`` more of PCM make possible, perhaps none. Raises as ``pcm16_bytes``."""
        if self._finished:
            raise ValueError("This stream is finished: make another encoder.")
        samples = pcm16_bytes(pcm)
        if self._track is None:
            self._outlet.write(samples)
        else:
            self._track.encode(samples)
        return self._outlet.take()

    def finish(self) -> bytes:
        """The rest. The container is closed before the rest is read: read the other way round, the end is lost."""
        if self._track is not None and not self._finished:
            self._track.close()
        self._finished = True
        return self._outlet.take()


class FileEncoder:
    """The same interface for a complete file, as ``encode_audio`` makes it: nothing comes before ``finish``."""

    def __init__(self, format: str, sample_rate: int) -> None:  # noqa: A002
        """Raises InvalidInputError for an unknown format."""
        self._format = check_format(format)
        self._sample_rate = sample_rate
        self._chunks: list[torch.Tensor] = []

    def feed(self, pcm: torch.Tensor) -> bytes:
        """Keep ``[samples]`` more of PCM."""
        self._chunks.append(pcm)
        return b""

    def finish(self) -> bytes:
        """All of it. Raises as ``encode_audio``."""
        return encode_audio(torch.cat([torch.zeros(0), *self._chunks]), self._sample_rate, self._format)


def streamed_wav_header(sample_rate: int) -> bytes:
    """The header of a 16-bit mono WAV whose length nobody knows yet."""
    form = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)  # PCM, mono, rate, bytes/s, block, bits
    size = struct.pack("<I", UNKNOWN_SIZE)
    return b"RIFF" + size + b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + size


class _Outlet:
    """The end of a pipe. It cannot seek, so FFmpeg writes no header that it would have to mend at the end (mp3's Xing
    frame, which says length and padding) and leaves the length of a flac open.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


class _Track:
    """One mono track in one FFmpeg container."""

    def __init__(self, encoding: Encoding, sample_rate: int, file: io.BytesIO | _Outlet) -> None:
        rates = av.Codec(encoding.codec, "w").audio_rates
        if rates and sample_rate not in rates:
            known = ", ".join(map(str, sorted(rates)))
            raise InvalidInputError(f"{encoding.container} carries {known} Hz, not {sample_rate}.", "response_format")
        options = {"flush_packets": "1", **encoding.container_options}  # each packet leaves at once
        self._container = av.open(file, "w", format=encoding.container, options=options)
        stream = self._container.add_stream(
            encoding.codec,
            sample_rate,
            options=dict(encoding.codec_options),
            layout="mono",
            format=encoding.sample_format,
        )
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        self._stream.codec_context.thread_count = 1  # many speak at once; threads per stream would only switch
        if encoding.bit_rate is not None:
            self._stream.bit_rate = encoding.bit_rate
        self._rate = sample_rate
        self._position = 0  # samples so far

    def encode(self, samples: bytes) -> None:
        if not samples:
            return
        frame = av.AudioFrame.from_ndarray(np.frombuffer(samples, "<i2")[None], format="s16", layout="mono")
        frame.sample_rate = self._rate
        frame.time_base = Fraction(1, self._rate)
        frame.pts = self._position
        self._position += frame.samples
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
