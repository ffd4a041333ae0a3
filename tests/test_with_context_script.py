"""test_with_context.py: what becomes context, what is said about it, and what bad input is told."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch

from csm_core.audio import write_wav
from csm_core.generator import Generator
from csm_core.prompt import Segment


@pytest.fixture(autouse=True)
def shipped_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSM_MODEL", "bundled")
    monkeypatch.setenv("CSM_DEVICE", "cpu")


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("test_with_context")


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[list[Segment]]:
    """The context of every text that is spoken, seen on its way in."""
    seen: list[list[Segment]] = []
    stream = Generator.stream

    def watched(self: Generator, text: str, speaker: int, context: list[Segment], *rest: object) -> object:
        seen.append(list(context))
        return stream(self, text, speaker, context, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "stream", watched)
    return seen


def clip(folder: Path, name: str = "turn.wav") -> str:
    write_wav(folder / name, 0.3 * torch.sin(torch.arange(24_000) / 20), 24_000)
    return str(folder / name)


def test_by_default_two_turns_are_spoken_first(
    script: ModuleType, contexts: list[list[Segment]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speech.wav"
    assert script.main(["--out", str(out), "--text", "We can go."]) == 0
    assert [[(segment.speaker, segment.text) for segment in context] for context in contexts] == [
        [],
        script.OPENING[:1],
        script.OPENING,
    ]
    printed = capsys.readouterr().out
    assert all(text in printed for _, text in script.OPENING)
    assert "We can go." in printed
    assert "model: " in printed
    info = soundfile.info(out)
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert f"{info.duration:.2f} s: We can go." in printed


def test_no_context(
    script: ModuleType, contexts: list[list[Segment]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--no-context", "--out", str(tmp_path / "a.wav")]) == 0
    assert contexts == [[]]
    assert "context:" not in capsys.readouterr().out


def test_recorded_context(script: ModuleType, contexts: list[list[Segment]], tmp_path: Path) -> None:
    a, b = clip(tmp_path, "a.wav"), clip(tmp_path, "b.wav")
    out = str(tmp_path / "out.wav")
    assert script.main(["--context", a, "Hello.", b, "1: Hi.", "--context", a, "0: Yes.", "--out", out]) == 0
    (context,) = contexts
    assert [(segment.speaker, segment.text) for segment in context] == [(0, "Hello."), (1, "Hi."), (0, "Yes.")]
    assert all(segment.audio.shape == (24_000,) for segment in context)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--context", "none.wav", "Hello."], 2, "no audio file none.wav"),
        (["--text", " "], 2, ""),
        (["--speaker", "1000"], 2, "speaker"),
        (["--device", "abacus"], 2, "device"),
        (["--model", "./nothing-here"], 1, "nothing-here"),
        (["--out", "no/such/folder.wav", "--no-context"], 1, "No such file"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    script: ModuleType, arguments: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert script.main(arguments) == code
    errors = capsys.readouterr().err
    assert errors.startswith("test_with_context: ")
    assert errors.count("\n") == 1
    assert complaint in errors
    assert not list(tmp_path.glob("*.wav"))


@pytest.mark.parametrize("arguments", [["--context", "only-one.wav"], ["--no-context", "--context", "a", "b"], ["--x"]])
def test_wrong_options(script: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
