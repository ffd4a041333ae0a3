"""Uploads as browsers and phones make them: webm, mp4/m4a and raw aac besides what ``decode_audio`` reads. Needs PyAV
(the extra ``serve``).

The first bytes choose one demuxer by name, so the hundreds of others in FFmpeg are never asked. Sizes are counted while
reading, as in ``files``. Knows no HTTP.
"""

import io

import av
import numpy as np
import numpy.typing as npt
import torch

from csm_core.audio.files import MAX_BYTES, MAX_SECONDS, check_shape, decode_audio, too_long, usable
from csm_core.errors import AudioDecodeError

CODECS = {"aac", "alac", "flac", "libopus", "mp3", "mp3float", "opus", "pcm_f32le", "pcm_s16le", "vorbis"}
PACKETS_PER_SECOND = 400  # opus has frames of 2.5 ms, nothing in use has shorter ones


def decode_upload(
    data: bytes, sample_rate: int, max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> torch.Tensor:
    """``decode_audio`` for more containers: same result, limits and errors."""
    demuxer = _demuxer(data)
    if demuxer is None:
        return decode_audio(data, sample_rate, max_seconds, max_bytes)
    if len(data) > max_bytes:
        raise AudioDecodeError(f"The audio is too large: {len(data):,} bytes, at most {max_bytes:,} are read.", "audio")
    try:
        with av.open(io.BytesIO(data), "r", format=demuxer, metadata_errors="ignore") as file:
            pcm, rate = _decode(file, max_seconds)
    except av.FFmpegError as error:
        raise AudioDecodeError("These bytes are not audio that can be read: the file is damaged.", "audio") from error
    return usable(pcm, rate, sample_rate)


def _demuxer(data: bytes) -> str | None:
    """FFmpeg's name for what libsndfile cannot read; None for the rest."""
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data[4:8] == b"ftyp":
        return "mov"
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:  # ADTS: the layer bits that MP3 never has
        return "aac"
    # A FLAC that was written into a pipe does not say how long it is, and libsndfile fails at its end.
    if data.startswith(b"fLaC") and int.from_bytes(data[18:26], "big") % 2**36 == 0:
        return "flac"
    return None


def _decode(file: av.container.InputContainer, max_seconds: float) -> tuple[torch.Tensor, int]:
    """Mono PCM ``[samples]`` of the first audio track, and its rate in Hz as its frames say, not the header."""
    stream = next(iter(file.streams.audio), None)
    if stream is None:
        raise AudioDecodeError("The file has no sound track.", "audio")
    codec = stream.codec_context.name if stream.codec_context else "none"  # a damaged header names one that is not
    if codec not in CODECS:
        raise AudioDecodeError(f"Audio in the codec {codec} is not read.", "audio")
    blocks: list[npt.NDArray[np.float32]] = []
    rate = total = 0
    for count, packet in enumerate(file.demux(stream)):
        if count > PACKETS_PER_SECOND * max_seconds + 1000:
            raise too_long(max_seconds)
        for frame in packet.decode():
            if not rate:
                check_shape(frame.sample_rate, frame.layout.nb_channels)
                rate, layout = frame.sample_rate, frame.layout.name
                to_float = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate)
            if (frame.sample_rate, frame.layout.name) != (rate, layout):
                raise AudioDecodeError("The audio changes its sample rate or channels on the way.", "audio")
            total += frame.samples
            if total > max_seconds * rate:
                raise too_long(max_seconds)
            blocks += [block.to_ndarray().mean(axis=0) for block in to_float.resample(frame)]
    pcm = torch.from_numpy(np.concatenate(blocks)) if blocks else torch.zeros(0)
    if not torch.isfinite(pcm).all():
        raise AudioDecodeError("The audio holds NaN or infinite samples.", "audio")
    return pcm, rate
