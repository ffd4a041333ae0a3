"""Sound files in and out: real encoders, hostile bytes, and limits that hold before the work that they bound."""

import base64
import io
import math
import struct
import sys
import time
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_core import audio
from csm_core.errors import AudioDecodeError, InvalidInputError

RATE = 24_000
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def tone(seconds: float = 0.5, rate: int = RATE, frequency: float = 440.0, level: float = 0.5) -> torch.Tensor:
    return level * torch.sin(torch.arange(int(seconds * rate)) / rate * (2 * math.pi * frequency))


def file_bytes(samples: torch.Tensor, rate: int, form: str = "WAV", subtype: str | None = None) -> bytes:
    """``samples`` [n] or [n, channels] as libsndfile writes them."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.numpy(), rate, format=form, subtype=subtype)
    return buffer.getvalue()


def strongest_frequency(pcm: torch.Tensor, rate: int = RATE) -> float:
    return float(torch.fft.rfft(pcm).abs().argmax()) * rate / len(pcm)


def test_wav_says_its_true_sizes() -> None:
    data = audio.encode_wav(tone(0.25), RATE)
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
    assert struct.unpack("<I", data[40:44])[0] == len(data) - 44 == 2 * 6000
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()) == (1, 2, RATE, 6000)


@SETTINGS
@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_16_bit_audio_survives_unchanged(samples: list[int]) -> None:
    pcm = torch.tensor(samples) / 32768
    data = audio.encode_wav(pcm, RATE)
    again, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert (again.tolist(), rate) == (samples, RATE)
    assert data.endswith(audio.pcm16_bytes(pcm))


def test_loud_samples_are_clipped_not_wrapped() -> None:
    pcm = torch.tensor([1.5, -1.5, 1.0, -1.0, 0.0])
    assert np.frombuffer(audio.pcm16_bytes(pcm), "<i2").tolist() == [32767, -32768, 32767, -32768, 0]


@pytest.mark.parametrize("bad", [torch.tensor([0.0, math.nan]), torch.tensor([math.inf]), torch.zeros(2, 5)])
def test_unusable_audio_is_not_encoded(bad: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError):
        audio.encode_wav(bad, RATE)


def test_base64_is_of_the_wav() -> None:
    assert base64.b64decode(audio.wav_base64(tone(), RATE)) == audio.encode_wav(tone(), RATE)


def test_files_round_trip(tmp_path: Path) -> None:
    audio.write_wav(tmp_path / "a.wav", tone(), RATE)
    torch.testing.assert_close(audio.read_audio(tmp_path / "a.wav", RATE), tone(), atol=2**-15, rtol=0)
    with pytest.raises(AudioDecodeError, match=r"no audio file .*b\.wav"):
        audio.read_audio(tmp_path / "b.wav", RATE)


@pytest.mark.parametrize(
    ("form", "subtype", "rate"),
    [
        ("WAV", "PCM_16", 24_000),
        ("WAV", "PCM_U8", 8_000),
        ("WAV", "PCM_24", 48_000),
        ("WAV", "FLOAT", 44_100),
        ("WAV", "ULAW", 8_000),
        ("FLAC", "PCM_16", 22_050),
        ("OGG", "VORBIS", 44_100),
        ("OGG", "OPUS", 48_000),
        ("MP3", "MPEG_LAYER_III", 44_100),
        ("AIFF", "PCM_16", 16_000),
        ("AU", "PCM_16", 11_025),
        ("CAF", "PCM_16", 96_000),
    ],
)
def test_common_formats_are_read_at_the_models_rate(form: str, subtype: str, rate: int) -> None:
    pcm = audio.decode_audio(file_bytes(tone(2.5, rate), rate, form, subtype), RATE)
    assert pcm.dtype == torch.float32
    assert pcm.ndim == 1
    assert len(pcm) == pytest.approx(2.5 * RATE, rel=0.03)  # mp3 and vorbis pad
    assert strongest_frequency(pcm) == pytest.approx(440, abs=1)
    assert 0.4 < pcm[RATE // 2 : RATE * 2].abs().max() < 0.6


def test_stereo_is_averaged() -> None:
    pcm = audio.decode_audio(file_bytes(torch.stack([tone(), torch.zeros(12_000)], 1), 8_000), 8_000)
    torch.testing.assert_close(pcm, tone() / 2, atol=1e-4, rtol=0)


def test_odd_rates_take_neither_gigabytes_nor_seconds() -> None:
    data = file_bytes(tone(0.5, 44_101), 44_101)
    began = time.perf_counter()
    pcm = audio.decode_audio(data, RATE)
    assert time.perf_counter() - began < 2
    assert strongest_frequency(pcm) == pytest.approx(440, abs=3)


def test_floats_beyond_full_scale_are_brought_back() -> None:
    pcm = audio.decode_audio(file_bytes(tone(level=20_000.0), RATE, subtype="FLOAT"), RATE)
    torch.testing.assert_close(pcm, tone(level=1.0), atol=1e-3, rtol=0)


def test_the_largest_floats_do_not_overflow() -> None:
    loudest = torch.finfo(torch.float32).max
    pcm = audio.decode_audio(file_bytes(torch.full((2400, 2), loudest), RATE, subtype="FLOAT"), RATE)
    torch.testing.assert_close(pcm, torch.ones(2400))


def test_a_header_that_lies_about_length_is_not_believed() -> None:
    data = bytearray(audio.encode_wav(tone(), RATE))
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)  # as streaming encoders leave it
    assert len(audio.decode_audio(bytes(data), RATE)) == 12_000


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "not audio that can be read"),
        (b"\x00" * 5000, "not audio that can be read"),
        (b"<!DOCTYPE html><html>404</html>", "not audio that can be read"),
        (audio.encode_wav(tone(), RATE)[:20], "not audio that can be read"),
        (audio.encode_wav(torch.zeros(0), RATE), "empty"),
        (audio.encode_wav(torch.zeros(RATE), RATE), "silent"),
        (audio.encode_wav(tone(level=5e-4), RATE), "silent"),
        (file_bytes(torch.tensor([0.1, math.nan, 0.1]), RATE, subtype="FLOAT"), "NaN or infinite"),
        (file_bytes(torch.tensor([0.1, math.inf, 0.1]), RATE, subtype="FLOAT"), "NaN or infinite"),
        (audio.encode_wav(tone(), 3_999), "3999 Hz"),
        (audio.encode_wav(tone(), 192_001), "192001 Hz"),
        (file_bytes(tone()[:900].reshape(100, 9), RATE), "9 channels"),
        (file_bytes(tone(), RATE, "MAT5", "PCM_16"), "format MAT5 is not read"),
    ],
    ids=str,
)
def test_unusable_bytes_get_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(AudioDecodeError, match=sentence) as caught:
        audio.decode_audio(data, RATE)
    assert caught.value.param == "audio"


def test_an_hour_is_refused_without_being_unpacked() -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8_000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.full(60 * 8_000, 0.25))
    hour = buffer.getvalue()
    assert len(hour) < audio.MAX_BYTES
    tracemalloc.start()
    with pytest.raises(AudioDecodeError, match="longer than 60 s"):
        audio.decode_audio(hour, RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 61 * 8_000 * 4 * 2 + 2 * len(hour)  # a minute of samples, not 115 MB


def test_the_limits_are_exact() -> None:
    data = audio.encode_wav(tone(2.0), RATE)
    assert len(audio.decode_audio(data, RATE, max_seconds=2.0, max_bytes=len(data))) == 2 * RATE
    with pytest.raises(AudioDecodeError, match=r"longer than 1\.99 s"):
        audio.decode_audio(data, RATE, max_seconds=1.99)
    with pytest.raises(AudioDecodeError, match="too large"):
        audio.decode_audio(data, RATE, max_bytes=len(data) - 1)


def test_a_large_file_is_not_even_opened(tmp_path: Path) -> None:
    with (tmp_path / "large.wav").open("wb") as file:
        file.truncate(audio.MAX_BYTES + 1)
    with pytest.raises(AudioDecodeError, match="too large"):
        audio.read_audio(tmp_path / "large.wav", RATE)


def test_a_seek_before_the_start_prints_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)  # where exceptions in libsndfile's callbacks end
    data = bytearray(file_bytes(tone(), RATE, "AIFF"))
    data[41:45] = b"\x7f\xff\xff\xff"  # a chunk of 2 GB
    with pytest.raises(AudioDecodeError):
        audio.decode_audio(bytes(data), RATE)
    assert printed == []


WHOLE_FILES = [file_bytes(tone(0.3), RATE, form) for form in ("WAV", "FLAC", "OGG", "MP3")]


@SETTINGS
@given(st.sampled_from(WHOLE_FILES), st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8))))
def test_damaged_files_decode_or_get_an_error_of_ours(data: bytes, damage: list[tuple[int, bytes]]) -> None:
    broken = bytearray(data)
    for place, patch in damage:
        broken[place : place + len(patch)] = patch
    try:
        pcm = audio.decode_audio(bytes(broken), RATE)
    except AudioDecodeError:
        return
    assert torch.isfinite(pcm).all()
    assert 0 < len(pcm) <= 61 * RATE


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: text,
        lambda text: f"data:audio/wav;base64,{text}",
        lambda text: f"data:audio/ogg;codecs=opus;base64,\n{text}\n",
        lambda text: "\r\n".join(text[i : i + 64] for i in range(0, len(text), 64)) + "\r\n",
    ],
)
def test_base64_as_people_send_it(wrap) -> None:
    data = audio.encode_wav(tone(), RATE)
    pcm = audio.decode_base64_audio(wrap(base64.b64encode(data).decode()), RATE, max_bytes=len(data))
    torch.testing.assert_close(pcm, audio.decode_audio(data, RATE))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("UklGR!JUNK", r"'!' \(number 6\)"),
        ("UklGRé", "not base64"),
        ("https://example.com/a.wav", "':'"),
        ("UklGR", "cut off"),
        ("UklG=Rg=", "cut off"),
        ("", "not audio"),
        (base64.b64encode(b"hello").decode(), "not audio"),
        (None, "NoneType"),
        (b"UklG", "bytes"),
    ],
)
def test_unusable_base64_gets_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(AudioDecodeError, match=sentence):
        audio.decode_base64_audio(text, RATE)


def test_the_length_of_base64_is_checked_before_anything_is_copied() -> None:
    text = "A" * 80_000_000
    tracemalloc.start()
    with pytest.raises(AudioDecodeError, match="too long"):
        audio.decode_base64_audio(text, RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_wav_that_is_written_as_it_comes_can_be_read_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "partial.wav"
    writer = audio.WavWriter(path, 24_000)
    assert not path.exists()
    writer.hear(torch.full((100,), 0.5))
    writer.hear(torch.full((50,), 0.5))
    with wave.open(str(path)) as file:
        assert file.getnframes() == 150
    writer.close()
