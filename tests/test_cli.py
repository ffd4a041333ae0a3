"""The ``csm`` command: what it writes, prints and answers with, over a tiny real model."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import soundfile
import torch

from csm_core import arguments, cli
from csm_core.audio import write_wav
from csm_core.generator import Generator
from csm_core.model.checkpoint import Description, save_native
from csm_core.model.csm import CSM
from csm_core.prompt import Segment

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and the tiny model as the default one."""
    monkeypatch.chdir(tmp_path)
    for name in ("CSM_VOICES", "CSM_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CSM_MODEL", str(tiny_checkpoint))
    monkeypatch.setenv("CSM_DEVICE", "cpu")
    return tmp_path


@pytest.fixture
def csm(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as end:  # argparse ends the process itself
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[Segment], dict[str, Any]]]:
    """What the generator is asked to speak, seen on its way in."""
    seen: list[tuple[str, int, list[Segment], dict[str, Any]]] = []
    stream = Generator.stream

    def watched(self: Generator, text: str, speaker: int, context: list[Segment], **rest: Any) -> Any:
        seen.append((text, speaker, list(context), rest))
        return stream(self, text, speaker, context, max_audio_length_ms=800, **rest)

    monkeypatch.setattr(Generator, "stream", watched)
    return seen


def sentence(error: str) -> str:
    """What an error must be: one line, of this program, without a traceback."""
    assert error.startswith("csm: "), error
    assert error.count("\n") == 1, error
    return error


def clip(name: str) -> str:
    write_wav(name, 0.3 * torch.sin(torch.arange(24_000) / 20), 24_000)
    return name


# --- say -------------------------------------------------------------------------------------------------------------


def test_say_writes_a_wav_and_says_so(csm: Run) -> None:
    code, out, err = csm("say", "Hi.", "-o", "hello.wav", "--seed", "3")
    assert (code, err) == (0, "")
    info = soundfile.info("hello.wav")
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert out.startswith(f"hello.wav: {info.duration:.2f} s of speech, RTF ")
    assert "tiny on cpu, seed 3" in out


def test_json_and_seeds(csm: Run) -> None:
    facts = []
    for file, seed, *options in (("a.wav", "5"), ("b.wav", "5", "--stream"), ("c.wav", "6")):
        code, out, _ = csm("say", "Hi.", "-o", file, "--seed", seed, "--json", *options)
        assert code == 0
        facts.append(json.loads(out))
    common = {"file", "duration_seconds", "rtf", "model", "device", "seed", "finish_reason", "takes"}
    assert [set(fact) - common for fact in facts] == [set(), {"ttfa_seconds"}, set()]
    assert all(common <= set(fact) for fact in facts)
    a, b, _ = facts
    assert (a["file"], a["model"], a["device"], a["seed"]) == ("a.wav", "tiny", "cpu", 5)
    assert a["finish_reason"] in {"eos", "length", "silence"}
    assert [(take["sentence"], take["number"]) for take in a["takes"]] == [(0, 0)]
    assert a["duration_seconds"] == pytest.approx(soundfile.info("a.wav").duration, abs=1e-3)
    assert 0 < b["ttfa_seconds"] <= b["rtf"] * b["duration_seconds"] + 0.01
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()
    assert Path("a.wav").read_bytes() != Path("c.wav").read_bytes()


def test_options_reach_the_generator(csm: Run, spoken: list[Any]) -> None:
    code, _, err = csm("say", "Hi.", "--speaker", "1", "--temperature", "0.5", "--topk", "7", "--seed", "-9")
    assert (code, err) == (0, "")
    ((text, speaker, context, options),) = spoken
    assert (text, speaker, context) == ("Hi.", 1, [])
    assert options == {"temperature": 0.5, "topk": 7, "seed": -9, "voice": None}
    assert Path("speech.wav").is_file()


def test_text_from_stdin(csm: Run, spoken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe.\n"))
    assert csm("say", "-")[0] == 0
    assert spoken[0][0].strip() == "From a pipe."


def test_context(csm: Run, spoken: list[Any]) -> None:
    context = ["--context", clip("a.wav"), "1: Good morning.", "--context", clip("b.wav"), "Good: morning."]
    assert csm("say", "Yes.", *context)[0] == 0
    segments = spoken[0][2]
    assert [(segment.speaker, segment.text) for segment in segments] == [(1, "Good morning."), (0, "Good: morning.")]
    assert all(segment.audio.shape == (24_000,) for segment in segments)


def test_voices(csm: Run, spoken: list[Any]) -> None:
    Path("voices/anna").mkdir(parents=True)
    clip("voices/anna/sample.wav")
    Path("voices/anna/transcript.txt").write_text("A buzz.", encoding="utf-8")
    assert csm("voices", "--voices", "voices") == (0, "anna\n", "")
    assert json.loads(csm("voices", "--voices", "voices", "--json")[1]) == {"folder": "voices", "voices": ["anna"]}
    assert "no voices" in csm("voices")[1]
    assert csm("say", "Hi.", "--voice", "anna", "--voices", "voices")[0] == 0
    assert csm("say", "Hi.", "--voice", "./voices/anna")[0] == 0
    assert [options["voice"] for *_, options in spoken] == ["anna", Path("voices/anna")]
    code, _, err = csm("say", "Hi.", "--voice", "anna")
    assert code == 2
    assert "no voice 'anna'" in sentence(err)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["\n\t "], ""),
        (["Hi.", "--temperature", "nan"], "temperature"),
        (["Hi.", "--topk", "-1"], "topk"),
        (["Hi.", "--speaker", "7"], "speaker"),
        (["Hi.", "--device", "abacus"], "device"),
        (["Hi.", "--context", "none.wav", "Hello."], "none.wav"),
        (["Hi.", "--context", "text.wav", "Hello."], "not audio"),
        (["Hi.", "-o", "no/such/folder.wav"], "cannot be written"),
        (["Hi.", "-o", "."], "cannot be written"),
    ],
)
def test_bad_input_is_code_2_and_a_sentence(csm: Run, options: list[str], complaint: str) -> None:
    Path("text.wav").write_text("no sound", encoding="utf-8")
    code, out, err = csm("say", *options, "--stream")
    assert (code, out) == (2, "")
    assert complaint in sentence(err)
    assert not Path("speech.wav").exists()


def test_bad_environment_is_code_2(csm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSM_LOG_LEVEL", "LOUD")
    code, _, err = csm("voices")
    assert code == 2
    assert "CSM_LOG_LEVEL" in sentence(err)


def test_other_failures_are_code_1(csm: Run) -> None:
    code, _, err = csm("say", "Hi.", "--model", "./nothing-here")
    assert code == 1
    assert "nothing-here" in sentence(err)


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_silence_is_an_error_and_no_file(
    csm: Run, options: list[str], tiny_checkpoint: Path, tiny_model: CSM, tiny_codec_state: dict[str, torch.Tensor]
) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    mute = {name: torch.zeros_like(value) if "decoder" in name else value for name, value in tiny_codec_state.items()}
    about = Description("mute", config["codec"], config["defaults"], tiny_checkpoint / "tokenizer.json")
    save_native(Path("mute"), tiny_model, mute, about, dtype=torch.float32)
    code, out, err = csm("say", "Hi.", "--model", "./mute", *options)
    assert (code, out) == (1, "")
    assert "3 takes" in sentence(err)
    assert not Path("speech.wav").exists()


def test_playing(csm: Run, monkeypatch: pytest.MonkeyPatch, spoken: list[Any]) -> None:
    played: list[torch.Tensor] = []
    module = Path("sounddevice.py")
    module.write_text(
        "class PortAudioError(Exception): pass\n"
        "class OutputStream:\n"
        "    played = []\n"
        "    def __init__(self, **options): pass\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *error): pass\n"
        "    def write(self, samples): self.played.append(samples)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(".")
    for name in ("sounddevice", "csm_core.playback"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, out, err = csm("say", "Hi.", "--play")
    played = sys.modules["sounddevice"].OutputStream.played
    assert (code, err) == (0, "")
    assert out.startswith("played: ")
    assert not Path("speech.wav").exists()
    whole = len(played[0])
    assert csm("say", "Hi.", "--play", "--stream", "-o", "a.wav", "--seed", "1")[0] == 0
    assert len(played) > 2
    assert sum(map(len, played)) - whole == soundfile.info("a.wav").frames
    for name in ("sounddevice", "csm_core.playback"):
        sys.modules.pop(name)


def test_without_a_sound_library_playing_is_a_sentence(csm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sounddevice.py").write_text("raise OSError('PortAudio library not found')", encoding="utf-8")
    monkeypatch.syspath_prepend(".")
    for name in ("sounddevice", "csm_core.playback"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, _, err = csm("say", "Hi.", "--play")
    assert code == 1
    assert "libportaudio2" in sentence(err)


# --- dialogue --------------------------------------------------------------------------------------------------------

SCRIPT = "Anna: Hello.\nBen: Hi.\nAnna: Well, well.\n"


def test_dialogue_in_one_file(csm: Run, spoken: list[Any]) -> None:
    Path("script.txt").write_text(SCRIPT, encoding="utf-8")
    code, out, err = csm("dialogue", "script.txt", "-o", "all.wav", "--json")
    assert (code, err) == (0, "")
    assert [(text, speaker) for text, speaker, *_ in spoken] == [("Hello.", 0), ("Hi.", 1), ("Well, well.", 0)]
    assert [len(context) for _, _, context, _ in spoken] == [0, 1, 2]
    assert [(s.speaker, s.text) for s in spoken[2][2]] == [(0, "Hello."), (1, "Hi.")]
    about = json.loads(out)
    turns = about["turns"]
    assert [(turn["name"], turn["speaker"]) for turn in turns] == [("Anna", 0), ("Ben", 1), ("Anna", 0)]
    seconds = sum(turn["duration_seconds"] for turn in turns)
    assert about["duration_seconds"] == pytest.approx(seconds)
    assert soundfile.info("all.wav").duration == pytest.approx(seconds + 2 * cli.GAP_SECONDS, abs=0.01)


def test_dialogue_in_a_file_per_turn(csm: Run, spoken: list[Any]) -> None:
    Path("script.json").write_text('[{"speaker": 1, "text": "Hi."}, {"speaker": "../Zoë", "text": "Yes."}]', "utf-8")
    code, out, _ = csm("dialogue", "script.json", "--out-dir", "turns/today")
    assert code == 0
    assert out.startswith("turns/today: 2 turns, ")
    assert [path.name for path in sorted(Path("turns/today").iterdir())] == ["001-1.wav", "002-zo.wav"]
    assert [speaker for _, speaker, *_ in spoken] == [1, 0]


def test_dialogue_refuses(csm: Run) -> None:
    Path("bad.txt").write_text("no speaker here", encoding="utf-8")
    assert csm("dialogue", "bad.txt")[0] == 2  # neither -o nor --out-dir
    code, _, err = csm("dialogue", "bad.txt", "-o", "x.wav")
    assert code == 2
    assert "line 1" in sentence(err)
    code, _, err = csm("dialogue", "none.txt", "-o", "x.wav")
    assert code == 2
    assert "none.txt" in sentence(err)


# --- convert, deploy -------------------------------------------------------------------------------------------------


def test_convert(csm: Run, tiny_checkpoint: Path) -> None:
    code, out, _ = csm("convert", str(tiny_checkpoint), "again", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] == sum(file.stat().st_size for file in Path("again").iterdir())
    assert csm("say", "Hi.", "--model", "./again")[0] == 0
    code, _, err = csm("convert", "./nothing-here", "x")
    assert code == 1
    assert "nothing-here" in sentence(err)


def test_deploy_check(csm: Run) -> None:
    assert csm("deploy", "check", str(ROOT))[0] == 0
    Path("cerebrium.toml").write_text("[cerebrium.deployment]\nname = 'x'\nnmae = 'y'\n", encoding="utf-8")
    code, out, _ = csm("deploy", "check")
    assert code == 1
    assert "error: deployment.nmae" in out
    code, out, _ = csm("deploy", "check", "cerebrium.toml", "--json")
    assert code == 1
    assert {"severity", "key", "message"} == set(json.loads(out)["findings"][0])


def test_deploy_try(csm: Run) -> None:
    code, out, _ = csm("deploy", "try", str(ROOT), "--text", "Hi.", "-o", "tried.wav")
    assert code == 0
    assert f"tried.wav: {soundfile.info('tried.wav').duration:.2f} s" in out
    assert "model tiny" in out
    assert "RTF" in out


def test_deploy_try_fails_with_the_clients_code(csm: Run) -> None:
    code, _, err = csm("deploy", "try", str(ROOT), "--text", " ")
    assert code == 1
    assert "422" in err
    code, _, err = csm("deploy", "try", ".")
    assert code == 2
    assert "main.py does not exist" in sentence(err)


def test_deploy_emulate_until_interrupted(place: Path) -> None:
    """A real process, port, call and ctrl-C; without --token one is made up and printed."""
    command = [sys.executable, "-m", "csm_core", "deploy", "emulate", str(ROOT / "main.py"), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(120, server.kill)
    watchdog.start()
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "ready: POST" in line:
                break
        token = next(line.split()[-1] for line in lines if "token for this run" in line)
        url = lines[-1].split("POST ")[1].split("/{")[0]
        assert requests.post(f"{url}/health", timeout=60).status_code == 401
        answer = requests.post(f"{url}/health", headers={"Authorization": f"Bearer {token}"}, timeout=60)
        assert answer.json()["result"]["model"] == "tiny"
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) in (0, 130)
        assert "Traceback" not in server.stderr.read()
    finally:
        watchdog.cancel()
        server.kill()
        server.communicate()


# --- terminal --------------------------------------------------------------------------------------------------------


def test_progress(csm: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A clock on stderr that runs while nothing is reported, once it takes long; nothing without a terminal."""
    monkeypatch.setattr(cli, "PATIENCE", 0.5)
    for shown in (True, False, None):
        with cli._progress("working", Namespace(progress=shown), 3, " turns") as advance:
            advance(1)
            time.sleep(1.2)
        out, err = capfd.readouterr()
        assert out == ""
        assert ("working: 1/3 turns, 00:01" in err) is (shown is True)
        with cli._progress("quick", Namespace(progress=shown)):
            pass
        assert capfd.readouterr().err.strip() == ""
    code, out, _ = csm("say", "Hi.", "--progress", "--json")
    assert code == 0
    json.loads(out)  # nothing of it on stdout


def test_the_log_on_demand(csm: Run) -> None:
    command = [sys.executable, "-m", "csm_core", "say", "Hi.", "-v"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0
    assert "loaded tiny" in done.stderr
    assert "Hi." not in done.stderr  # no text in a log


def test_interrupted(csm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    assert csm("say", "Hi.") == (130, "", "csm: interrupted\n")


def test_help_says_what_codes_mean(csm: Run) -> None:
    code, out, _ = csm("--help")
    assert code == 0
    assert "exit codes:" in out
    assert csm("--version")[1].startswith("csm ")
    assert csm()[0] == csm("sing")[0] == csm("say")[0] == csm("say", "x", "--speaker", "y")[0] == 2
    assert set(cli._COMMANDS) == {
        arguments.read([*name.split(), *filled]).command
        for name, filled in {
            "say": ["x"], "dialogue": ["x", "-o", "y"], "voices": [], "convert": ["x", "y"], "bench": [], "serve": [],
            "deploy check": [], "deploy emulate": [], "deploy try": [],
        }.items()
    }  # fmt: skip


def test_help_is_fast() -> None:
    """No model library is imported before a command needs it: 0.1 s against 1.5 s on an idle machine."""
    code = "import sys; from csm_core import cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "moshi", "soundfile", "huggingface_hub", "tqdm", "starlette"} & set(
        done.stdout.split()
    )
