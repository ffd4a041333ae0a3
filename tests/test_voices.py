"""Voices as folders: what is read, what is refused with a sentence, and the cache of codes."""

import json
import math
import os
from pathlib import Path
from threading import Thread

import pytest
import soundfile
import torch

from csm_core.audio import write_wav
from csm_core.errors import InvalidInputError
from csm_core.voices import CodesCache, Voice, VoiceCache, is_installed, list_voices

RATE = 24_000
TONE = 0.5 * torch.sin(torch.arange(4800) / RATE * (2 * math.pi * 440))


def load_voice(voice: str | Path, voices_dir: Path | None, sample_rate: int) -> Voice:
    return VoiceCache(sample_rate).get(voice, voices_dir)


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    for name in ("anna", "bob_2"):
        (tmp_path / name).mkdir()
        write_wav(tmp_path / name / "sample.wav", TONE, RATE)
        (tmp_path / name / "transcript.txt").write_text(f"I am {name}.\n", encoding="utf-8")
    (tmp_path / "bob_2" / "voice.json").write_text(json.dumps({"speaker": 3}), encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "read.me").write_text("not a voice", encoding="utf-8")
    return tmp_path


def test_a_voice_is_a_folder(voices: Path) -> None:
    assert list_voices(voices) == ["anna", "bob_2"]
    anna, bob = load_voice("anna", voices, RATE), load_voice("bob_2", voices, RATE)
    assert (anna.name, bob.name) == ("anna", "bob_2")
    assert [(s.speaker, s.text) for s in (*anna.segments, *bob.segments)] == [(0, "I am anna."), (3, "I am bob_2.")]
    torch.testing.assert_close(anna.segments[0].audio, TONE, atol=2**-15, rtol=0)


def test_only_a_name_in_the_folder_is_installed(voices: Path) -> None:
    assert is_installed("anna", voices)
    for name in ("notes", "carl", "../" + voices.name + "/anna", str(voices / "anna"), ""):
        assert not is_installed(name, voices)
    assert not is_installed("anna", None)


def test_a_path_is_a_folder_anywhere(voices: Path) -> None:
    assert load_voice(voices / "anna", None, RATE).name == "anna"


def test_samples_come_in_any_format_and_at_the_models_rate(voices: Path) -> None:
    (voices / "anna" / "sample.wav").unlink()
    soundfile.write(voices / "anna" / "sample.flac", TONE.numpy(), 48_000)
    assert len(load_voice("anna", voices, RATE).segments[0].audio) == 2400


def test_no_folder_no_voices(tmp_path: Path) -> None:
    assert list_voices(None) == list_voices(tmp_path / "nowhere") == []
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(InvalidInputError, match="no voices are installed here"):
            load_voice("anna", folder, RATE)


def test_an_unknown_name_lists_the_known(voices: Path) -> None:
    with pytest.raises(InvalidInputError, match="no voice 'carl'; the voices here are: anna, bob_2") as caught:
        load_voice("carl", voices, RATE)
    assert caught.value.param == "voice"


@pytest.mark.parametrize(
    "name",
    ["../anna", "..", ".", "", "a/b", "/etc", "a\\b", "a\0b", "anna\n", "a b", "é", "x" * 65, "read.me", None, 5],
)
def test_a_name_cannot_leave_the_folder(voices: Path, name: str) -> None:
    inner = voices / "anna"  # from here "../bob_2" would exist
    for folder in (voices, inner):
        with pytest.raises(InvalidInputError, match="letters, digits"):
            load_voice(name, folder, RATE)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("sample.wav", None, "no sample.wav"),
        ("sample.wav", b"noise", "sample of voice anna cannot be used.*not audio"),
        ("transcript.txt", None, "no transcript.txt: write what is said"),
        ("transcript.txt", b" \n", "nothing to speak"),
        ("transcript.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("voice.json", b"{", "is not JSON"),
        ("voice.json", b"\xff", "is not JSON"),
        ("voice.json", b"[1]", "nothing else"),
        ("voice.json", b'{"speaker": 0, "pitch": 2}', "nothing else"),
        ("voice.json", b'{"speaker": "x"}', "speaker must be a whole number"),
    ],
)
def test_a_broken_voice_says_what_is_wrong(voices: Path, file: str, content: bytes | None, sentence: str) -> None:
    if content is None:
        (voices / "anna" / file).unlink()
    else:
        (voices / "anna" / file).write_bytes(content)
    with pytest.raises(InvalidInputError, match=sentence):
        load_voice(voices / "anna", None, RATE)


def test_a_voice_is_read_once(voices: Path) -> None:
    cache = VoiceCache(RATE)
    anna = cache.get("anna", voices)
    assert cache.get("anna", voices) is cache.get(voices / "anna", None) is anna
    assert cache.get("bob_2", voices).segments[0].speaker == 3
    plain = load_voice("anna", voices, RATE)
    assert (anna.name, anna.segments[0].text) == (plain.name, plain.segments[0].text)
    assert torch.equal(anna.segments[0].audio, plain.segments[0].audio)
    with pytest.raises(InvalidInputError, match="letters, digits"):
        cache.get("../anna", voices)


def test_a_voice_that_changed_is_read_again(voices: Path) -> None:
    cache, folder = VoiceCache(RATE), voices / "anna"
    old = cache.get("anna", voices)
    write_wav(folder / "sample.wav", -TONE, RATE)  # as long as before, at another time
    new = cache.get("anna", voices)
    torch.testing.assert_close(new.segments[0].audio, -TONE, atol=2**-15, rtol=0)

    (folder / "transcript.txt").write_text("I am another.", encoding="utf-8")
    assert cache.get("anna", voices).segments[0].text == "I am another."
    (folder / "voice.json").write_text('{"speaker": 7}', encoding="utf-8")
    assert cache.get("anna", voices).segments[0].speaker == 7

    status = (folder / "sample.wav").stat()
    write_wav(folder / "moved.wav", TONE, RATE)
    os.utime(folder / "moved.wav", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "moved.wav").replace(folder / "sample.wav")  # same size, same time, another file
    assert torch.equal(cache.get("anna", voices).segments[0].audio, old.segments[0].audio)


def test_a_voice_that_is_gone_or_broken_is_not_remembered(voices: Path) -> None:
    cache = VoiceCache(RATE)
    cache.get("anna", voices)
    transcript = voices / "anna" / "transcript.txt"
    transcript.rename(voices / "kept")
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"no transcript\.txt"):
            cache.get("anna", voices)
    (voices / "kept").rename(transcript)
    assert cache.get("anna", voices).segments[0].text == "I am anna."
    (voices / "anna" / "sample.wav").unlink()
    with pytest.raises(InvalidInputError, match="no voice 'anna'; the voices here are: bob_2"):
        cache.get("anna", voices)


def test_only_so_many_voices_are_kept(voices: Path) -> None:
    cache = VoiceCache(RATE, capacity=1)
    anna = cache.get("anna", voices)
    cache.get("bob_2", voices)
    assert cache.get("anna", voices) is not anna


class Encoder:
    """Codes that show which audio they are of; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, audio: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return audio[:1].long().reshape(1, 1)


def clip(n: int) -> torch.Tensor:
    return torch.full((10,), float(n))


def test_equal_audio_is_encoded_once() -> None:
    cache, encode = CodesCache(), Encoder()
    assert cache.get(clip(7), encode).item() == cache.get(clip(7), encode).item() == 7
    assert cache.get(clip(8), encode).item() == 8
    assert encode.calls == 2


def test_the_least_recently_used_goes_first() -> None:
    cache, encode = CodesCache(capacity=2), Encoder()
    for n in (1, 2, 1, 3):  # 2 goes, not 1
        cache.get(clip(n), encode)
    assert (len(cache), encode.calls) == (2, 3)
    cache.get(clip(1), encode)
    assert encode.calls == 3
    cache.get(clip(2), encode)
    assert encode.calls == 4


def test_a_failed_encoding_is_not_remembered() -> None:
    cache = CodesCache()
    with pytest.raises(ZeroDivisionError):
        cache.get(clip(1), lambda audio: torch.tensor(1 // 0))
    assert cache.get(clip(1), Encoder()).item() == 1


def test_many_threads_get_their_own_codes() -> None:
    cache, encode, wrong = CodesCache(capacity=3), Encoder(), []

    def use(seed: int) -> None:
        for step in range(200):
            n = (seed * 7 + step * step) % 11
            if cache.get(clip(n), encode).item() != n:
                wrong.append(n)

    threads = [Thread(target=use, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, len(cache)) == ([], 3)
