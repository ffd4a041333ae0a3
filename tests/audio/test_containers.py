"""Uploads of browsers and phones, and hostile ones: real files of FFmpeg's muxers, damaged, forged and far too long."""

import io
import math
import time
import tracemalloc

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_core.audio import MAX_BYTES, decode_audio
from csm_core.audio.containers import decode_upload
from csm_core.audio.formats import FORMATS, StreamEncoder, encode_audio
from csm_core.errors import AudioDecodeError

RATE = 24_000


def file_of(container: str, codec: str, seconds: float = 1.0, rate: int = 48_000, layout: str = "stereo") -> bytes:
    """A tone of 440 Hz at half scale in every channel."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        samples = (0.5 * np.sin(2 * math.pi * 440 * np.arange(round(seconds * rate)) / rate) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(
            samples.repeat(av.AudioLayout(layout).nb_channels)[None], format="s16", layout=layout
        )
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("webm", "libopus", 48_000),  # what Chromium and Firefox record
        ("mp4", "aac", 44_100),  # what Safari and phones record
        ("adts", "aac", 48_000),
        ("mov", "pcm_s16le", 48_000),
        ("mp4", "libmp3lame", 44_100),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_recordings_of_browsers_are_read(container: str, codec: str, rate: int, layout: str) -> None:
    pcm = decode_upload(file_of(container, codec, 1.0, rate, layout), RATE)
    assert pcm.dtype == torch.float32
    assert pcm.ndim == 1
    assert len(pcm) == pytest.approx(RATE, abs=0.06 * RATE)
    assert float(torch.fft.rfft(pcm).abs().argmax()) * RATE / len(pcm) == pytest.approx(440, abs=2)
    assert 0.45 < pcm[RATE // 4 : RATE // 2].abs().max() < 0.55  # channels are averaged


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"pcm"}))
def test_everything_that_is_spoken_here_can_be_sent_back(form: str) -> None:
    pcm = 0.5 * torch.sin(torch.arange(RATE) * (2 * math.pi * 440 / RATE))
    encoder = StreamEncoder(form, RATE)
    for data in (encoder.feed(pcm) + encoder.finish(), encode_audio(pcm, RATE, form)):
        assert len(decode_upload(data, RATE)) == pytest.approx(RATE, abs=0.09 * RATE)


def test_a_flac_from_a_pipe_keeps_its_end() -> None:
    pcm = 0.5 * torch.sin(torch.arange(RATE + 123) * 0.1)
    encoder = StreamEncoder("flac", RATE)
    data = encoder.feed(pcm) + encoder.finish()
    torch.testing.assert_close(decode_upload(data, RATE), pcm, atol=2**-15, rtol=0)


def test_the_rest_is_read_as_before() -> None:
    data = encode_audio(torch.full((RATE,), 0.25), RATE, "wav")
    torch.testing.assert_close(decode_upload(data, RATE), decode_audio(data, RATE))
    with pytest.raises(AudioDecodeError, match="not audio that can be read"):
        decode_upload(b"<!DOCTYPE html>", RATE)


def long_silence(container: str, codec: str, minutes: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8_000 if codec == "flac" else 48_000, layout="mono")
        if codec == "libopus":
            stream.bit_rate = 6_000
        for _ in range(minutes):
            frame = av.AudioFrame(format="s16", layout="mono", samples=60 * stream.rate)
            frame.sample_rate = stream.rate
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec", "minutes"), [("flac", "flac", 60), ("ogg", "libopus", 1), ("webm", "libopus", 1)]
)
def test_small_files_that_unpack_to_hours_stop_at_the_limit(container: str, codec: str, minutes: int) -> None:
    data = long_silence(container, codec, minutes)
    assert len(data) < 60 * minutes * 8_000 * 4 / 40  # a fortieth of what it becomes, or less
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(AudioDecodeError, match="longer than 5 s"):
        decode_upload(data, RATE, max_seconds=5.0)
    took = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 48_000 * 4 * 4 + 3 * len(data)
    assert took < 2.0


def test_a_rate_in_the_header_is_not_believed() -> None:
    """Opus always decodes to 48 kHz; a WebM that says 4 kHz would otherwise be let in for twelve times the limit."""
    data = bytearray(file_of("webm", "libopus", 3.0, layout="mono"))
    place = data.index(b"\xb5\x88") + 2  # SamplingFrequency, 8 bytes
    data[place : place + 8] = np.float64(4_000).astype(">f8").tobytes()
    with pytest.raises(AudioDecodeError, match="longer than 2 s"):
        decode_upload(bytes(data), RATE, max_seconds=2.0)
    assert len(decode_upload(bytes(data), RATE, max_seconds=4.0)) == pytest.approx(3 * RATE, abs=0.1 * RATE)


@pytest.mark.parametrize("rate", [1, 3_999, 400_000, 655_350])
def test_forged_rates_of_flac_are_refused(rate: int) -> None:
    encoder = StreamEncoder("flac", RATE)
    data = bytearray(encoder.feed(torch.full((RATE,), 0.25)) + encoder.finish())
    data[18:21] = (rate << 4 | data[20] & 15).to_bytes(3, "big")  # 20 bits in STREAMINFO
    try:
        pcm = decode_upload(bytes(data), RATE)
    except AudioDecodeError:
        return
    assert len(pcm) <= 60 * RATE  # the frames say the true rate, and they are what counts


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x1aE\xdf\xa3" + bytes(100), "damaged"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(100), "damaged|no sound"),
        (b"\xff\xf1" + bytes(100), "damaged|no sound|empty"),
        (b"fLaC" + bytes(40), "damaged|no sound|empty"),
        (b"\x1aE\xdf\xa3" + bytes(MAX_BYTES), "too large"),
        (file_of("matroska", "ac3"), "codec ac3 is not read"),
        (file_of("webm", "libopus")[:700], "empty|damaged"),
    ],
    ids="webm mp4 adts flac large ac3 cut".split(),
)
def test_unusable_uploads_get_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(AudioDecodeError, match=sentence) as caught:
        decode_upload(data, RATE)
    assert caught.value.param == "audio"


def test_a_film_without_sound_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        out.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        out.mux(stream.encode(None))
    with pytest.raises(AudioDecodeError, match="no sound track"):
        decode_upload(file.getvalue(), RATE)


WHOLE_FILES = [file_of("webm", "libopus", 0.3), file_of("mp4", "aac", 0.3), file_of("adts", "aac", 0.3)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(WHOLE_FILES),
    st.lists(st.tuples(st.integers(4, 3000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=12),
)
def test_damaged_uploads_decode_or_get_an_error_of_ours(data: bytes, damage: list[tuple[int, bytes]]) -> None:
    broken = bytearray(data)
    for place, patch in damage:
        broken[place : place + len(patch)] = patch
    try:
        pcm = decode_upload(bytes(broken), RATE)
    except AudioDecodeError:
        return
    assert torch.isfinite(pcm).all()
    assert 0 < len(pcm) <= 61 * RATE
