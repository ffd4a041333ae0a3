"""The six formats, read back by decoders that did not write them: libsndfile, and FFmpeg's for aac only."""

import io
import itertools
import math
import struct
import wave

import av
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

from csm_core.audio import pcm16_bytes
from csm_core.audio.formats import FORMATS, StreamEncoder, encode_audio
from csm_core.errors import InvalidInputError

RATE = 24_000
FRAME = 1920  # samples of the model's frame of 80 ms
LOSSLESS = ["flac", "wav", "pcm"]
# What a decoder returns beyond the speech. mp3: both codecs' delay and the last frame, where no Xing frame tells; aac:
# 1024 samples of priming and the last frame, which ADTS cannot tell. Ogg says its exact end.
PADDING = {"mp3": 0.06, "aac": 0.09}


def speech(seconds: float = 2.013) -> torch.Tensor:
    """A tone of 440 Hz in syllables, loud to its very end, where it jumps up to 660 Hz for 0.1 s."""
    time = torch.arange(round(seconds * RATE)) / RATE
    pitch = torch.where(time < seconds - 0.1, 440.0, 660.0)
    phase = torch.cumsum(pitch / RATE, 0) * (2 * math.pi)
    return (0.5 + 0.3 * torch.cos(2 * math.pi * 4 * (time - seconds))) * torch.sin(phase)


def streamed(pcm: torch.Tensor, form: str, size: int = FRAME) -> list[bytes]:
    encoder = StreamEncoder(form, RATE)
    return [*(encoder.feed(chunk) for chunk in pcm.split(size)), encoder.finish()]


def decoded(data: bytes, form: str) -> npt.NDArray[np.int16]:
    if form == "pcm":
        return np.frombuffer(data, "<i2")
    if form == "aac":
        with av.open(io.BytesIO(data), format="aac") as file:
            return np.concatenate([(f.to_ndarray()[0] * 32768).astype(np.int16) for f in file.decode(audio=0)])
    if form == "flac" and not (head := int.from_bytes(data[18:26], "big")) % 2**36:
        # Written into a pipe, so its header says no length; libsndfile reads it to the end only where it does.
        data = data[:18] + (head | len(speech())).to_bytes(8, "big") + data[26:]
    samples, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == RATE
    return samples


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_carry_every_sample_streamed_and_whole(form: str) -> None:
    pcm = speech()
    exact = np.frombuffer(pcm16_bytes(pcm), "<i2")
    for data in (b"".join(streamed(pcm, form)), b"".join(streamed(pcm, form, 777)), encode_audio(pcm, RATE, form)):
        assert np.array_equal(decoded(data, form), exact)


@pytest.mark.parametrize("form", ["mp3", "opus", "aac"])
@pytest.mark.parametrize("whole", [True, False])
def test_lossy_formats_last_as_long_as_the_speech_and_keep_its_end(form: str, whole: bool) -> None:
    pcm = speech()
    heard = decoded(encode_audio(pcm, RATE, form) if whole else b"".join(streamed(pcm, form)), form)
    padding = 0.0 if form == "opus" or (form == "mp3" and whole) else PADDING[form]
    assert 0 <= len(heard) - len(pcm) <= padding * RATE
    # Delay and padding aside it is the same sound; at its end it is the last tenth of a second that is heard.
    delay = int(np.correlate(heard[: 4 * FRAME].astype(float), pcm[: 2 * FRAME].numpy(), "valid").argmax())
    assert delay <= padding * RATE
    same = heard[delay : delay + len(pcm)].astype(np.float64) / 32768
    end = same[-round(0.08 * RATE) :]
    assert np.sqrt(np.mean(end**2)) == pytest.approx(float(pcm[-len(end) :].square().mean().sqrt()), rel=0.15)
    spectrum = np.abs(np.fft.rfft(end * np.hanning(len(end))))
    assert spectrum.argmax() * RATE / len(end) == pytest.approx(660, abs=13)
    error = same[: len(same) - FRAME] - pcm[: len(same) - FRAME].numpy()
    assert np.sqrt(np.mean(error**2)) < 0.05


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_flow_while_it_speaks(form: str) -> None:
    parts = streamed(speech(), form)
    assert any(parts[:2])  # at the second frame at the latest, after 160 ms of speech
    assert all(a or b for a, b in itertools.pairwise(parts[1:-2]))  # a flac frame is 96 ms, so now and then none
    held_back = len(parts[-1]) / sum(map(len, parts))
    assert held_back < 0.1  # and not in a heap at the end: a frame is 4 % of this


@pytest.mark.parametrize("form", FORMATS)
def test_the_end_comes_with_finish_even_after_one_short_chunk(form: str) -> None:
    pcm = speech()[:300]  # shorter than any codec's frame
    encoder = StreamEncoder(form, RATE)
    data = encoder.feed(pcm) + encoder.finish()
    assert encoder.finish() == b""
    with pytest.raises(ValueError, match="finished"):
        encoder.feed(pcm)
    assert len(decoded(data if form != "flac" else encode_audio(pcm, RATE, form), form)) >= 300


@pytest.mark.parametrize("form", FORMATS)
def test_a_stream_without_sound_ends_without_noise(form: str) -> None:
    encoder = StreamEncoder(form, RATE)
    assert len(encoder.feed(torch.zeros(0)) + encoder.finish()) <= 100  # a header at most


def test_a_streamed_wav_says_that_its_length_is_unknown_and_a_whole_one_says_it() -> None:
    pcm = speech(0.5)
    first = StreamEncoder("wav", RATE).feed(pcm)
    assert first[:4] + first[8:16] == b"RIFFWAVEfmt " and first[36:40] == b"data"
    assert struct.unpack("<I", first[4:8]) == struct.unpack("<I", first[40:44]) == (0xFFFFFFFF,)
    assert first[44:] == pcm16_bytes(pcm)
    with wave.open(io.BytesIO(encode_audio(pcm, RATE, "wav"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, len(pcm))


def test_whole_files_say_their_length() -> None:
    pcm = speech(3.0)
    for form in ("mp3", "flac", "opus"):
        assert soundfile.info(io.BytesIO(encode_audio(pcm, RATE, form))).frames == len(pcm)


def test_a_streamed_mp3_begins_with_sound() -> None:
    """A Xing frame or an ID3 tag at its head could only say something wrong: browsers then stop early."""
    data = b"".join(streamed(speech(0.5), "mp3"))
    assert data[0] == 0xFF
    assert data[1] & 0xE6 == 0xE2  # layer III
    assert b"Xing" not in data and b"Info" not in data and b"ID3" not in data


@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_other_rates_of_codecs(rate: int) -> None:
    for form in FORMATS:
        encoder = StreamEncoder(form, rate)
        assert encoder.feed(torch.full((rate // 2,), 0.1)) + encoder.finish()


def test_what_cannot_be_encoded_gets_a_sentence() -> None:
    with pytest.raises(InvalidInputError, match=r"no format 'ogg'; there are mp3, opus, aac, flac, wav, pcm"):
        StreamEncoder("ogg", RATE)
    with pytest.raises(InvalidInputError, match=r"no format '\.\./x'"):
        encode_audio(speech(0.1), RATE, "../x")
    with pytest.raises(InvalidInputError, match="not 22050"):
        StreamEncoder("opus", 22_050)
    for form in FORMATS:
        with pytest.raises(InvalidInputError, match="NaN"):
            StreamEncoder(form, RATE).feed(torch.tensor([0.0, math.nan]))


def test_streams_that_are_given_up_leave_nothing() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4096

    pcm = speech(0.1)
    sizes = []
    for _ in range(4):
        for _ in range(12):
            for form in ("mp3", "opus", "aac", "flac"):
                StreamEncoder(form, RATE).feed(pcm)
        sizes.append(resident())
    # 48 that stayed would take 100 MB each time; the allocator's own ups and downs are some MB, and not every time.
    assert min(b - a for a, b in itertools.pairwise(sizes)) < 20 * 2**20
