"""The ``csm`` command: an ordinary user of the package's public names, from a terminal.

Commands import what they need when they run, so that ``csm --help`` does not wait for PyTorch (0.1 s against 2 s).
Results go to stdout, progress and errors to stderr. Knows no model, no HTTP and no platform.
"""

import argparse
import contextlib
import json
import logging
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_core import arguments
from csm_core.config import EngineConfig, ServerSettings, Settings
from csm_core.dialogue import Turn, read_line, read_script
from csm_core.errors import CsmError, InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from csm_core import Generator, Segment
    from csm_core.playback import Player

GAP_SECONDS = 0.25  # between the turns of a dialogue in one file
PATIENCE = 2.0  # seconds before a progress line appears

Advance = Callable[[float], object]
Hear = Callable[["Tensor"], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors that have a name become one sentence on stderr."""
    args = arguments.read(argv)
    args.argv = ["csm", *(sys.argv[1:] if argv is None else argv)]
    try:
        args.settings = Settings.from_env()
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        level = args.settings.log_level if args.verbose else "WARNING"
        logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
        return _COMMANDS[args.command](args)
    except InvalidInputError as error:
        return _fail(str(error), 2)
    except CsmError as error:
        return _fail(str(error), 1)
    except OSError as error:  # a file that cannot be written, a port that is taken
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except ModuleNotFoundError as error:
        extras = "bench,emulate,play,serve"
        return _fail(f"the package {error.name} is missing; pip install 'csm-core[{extras}]' brings it", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(sentence: str, code: int) -> int:
    print(f"csm: {sentence}", file=sys.stderr)
    return code


# --- speech ----------------------------------------------------------------------------------------------------------


def _say(args: argparse.Namespace) -> int:
    turn = Turn("", args.speaker, sys.stdin.read() if args.text == "-" else args.text)
    player = _player() if args.play else None
    file = args.out or (None if player else Path("speech.wav"))
    _check_target(file)
    with _generator(args) as generator, contextlib.ExitStack() as opened:
        rate = generator.sample_rate
        context = [_recorded_turn(path, said, args.speaker, rate) for path, said in args.context]
        sinks: list[Hear] = []
        if player:
            opened.enter_context(player.playing(rate))
            sinks.append(player.hear)
        if file:
            from csm_core.audio import WavWriter

            sinks.append(opened.enter_context(contextlib.closing(WavWriter(file, rate))).hear)
        with _progress("speaking", args, unit=" s of speech") as advance:
            early = sinks if args.stream else []
            audio, facts = _speak(generator, args, turn, context, [*early, lambda c: advance(c.numel() / rate)])
        if not args.stream:
            del facts["ttfa_seconds"]
            for hear in sinks:
                hear(audio)
    facts = {"file": str(file) if file else None, **facts}
    _print(args, facts, _sentence(facts))
    return 0


def _dialogue(args: argparse.Namespace) -> int:
    turns = read_script(args.script)
    _check_target(args.out)
    facts: list[dict[str, Any]] = []
    segments: list[Segment] = []
    with _generator(args) as generator, _progress("speaking", args, len(turns), " turns") as advance:
        for turn in turns:
            audio, spoken = _speak(generator, args, turn, segments, [])
            segments.append(_segment(turn, audio))
            facts.append({"name": turn.name, "speaker": turn.speaker, **spoken})
            if args.out_dir:
                args.out_dir.mkdir(parents=True, exist_ok=True)
                facts[-1]["file"] = str(args.out_dir / f"{len(facts):03}-{_file_name(turn.name)}.wav")
                _save(Path(facts[-1]["file"]), audio, generator.sample_rate)
            advance(1)
        if args.out:
            _save(args.out, _joined(segments, generator.sample_rate), generator.sample_rate)
    seconds = sum(fact["duration_seconds"] for fact in facts)
    rtf = sum(fact["rtf"] * fact["duration_seconds"] for fact in facts) / seconds
    about = {"file": str(args.out or args.out_dir), "duration_seconds": round(seconds, 3), "rtf": round(rtf, 3)}
    where = {"model": generator.model_name, "device": generator.device}
    line = f"{about['file']}: {len(turns)} turns, {seconds:.2f} s of speech, RTF {rtf:.2f}"
    _print(args, {**about, **where, "turns": facts}, f"{line}, {generator.model_name} on {generator.device}")
    return 0


@contextlib.contextmanager
def _generator(args: argparse.Namespace) -> "Iterator[Generator]":
    settings: Settings = args.settings
    with _progress("loading the model", args):
        from csm_core import load

        settings = replace(settings, voices=args.voices or settings.voices)
        generator = load(args.model or settings.model, args.device or settings.device, settings)
    with generator:
        yield generator


def _speak(
    generator: "Generator", args: argparse.Namespace, turn: Turn, context: "Sequence[Segment]", hear: Sequence[Hear]
) -> "tuple[Tensor, dict[str, Any]]":
    """Speak one turn; every chunk goes to each of ``hear`` as it comes. Returns the whole and what is known of it."""
    import torch

    voice: str | Path | None = args.voice
    if voice and ("/" in args.voice or "\\" in args.voice):  # a folder, not the name of one in the voices' folder
        voice = Path(voice)
    started = time.perf_counter()
    first_sound = 0.0
    chunks: list[Tensor] = []
    stream = generator.stream(
        turn.text, turn.speaker, context, temperature=args.temperature, topk=args.topk, seed=args.seed, voice=voice
    )
    with stream:
        for chunk in stream:
            first_sound = first_sound or time.perf_counter() - started
            chunks.append(chunk)
            for listener in hear:
                listener(chunk)
        elapsed = time.perf_counter() - started
    audio = torch.cat(chunks)
    seconds = audio.numel() / generator.sample_rate
    return audio, {
        "duration_seconds": round(seconds, 3),
        "rtf": round(elapsed / seconds, 3),
        "ttfa_seconds": round(first_sound, 3),
        "model": generator.model_name,
        "device": generator.device,
        "seed": stream.seed,
        "finish_reason": stream.finish_reason,
        "takes": [asdict(take) for take in stream.takes],
    }


def _recorded_turn(path: str, said: str, speaker: int, sample_rate: int) -> "Segment":
    from csm_core.audio import read_audio

    return _segment(read_line(said, speaker), read_audio(path, sample_rate))


def _segment(turn: Turn, audio: "Tensor") -> "Segment":
    from csm_core import Segment

    return Segment(turn.speaker, turn.text, audio)


def _joined(segments: "Sequence[Segment]", sample_rate: int) -> "Tensor":
    import torch

    gap = torch.zeros(round(GAP_SECONDS * sample_rate))
    return torch.cat([part for segment in segments for part in (gap, segment.audio)][1:])


# --- sound out -------------------------------------------------------------------------------------------------------


def _check_target(file: Path | None) -> None:
    """Before the model is loaded, not after the speech is made."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise InvalidInputError(f"{file} cannot be written: it is a folder, or its folder does not exist.", "out")


def _player() -> "Player":
    try:
        from csm_core.playback import Player
    except (ImportError, OSError) as error:  # OSError: the system's PortAudio library is missing
        raise CsmError(
            "playback needs the sounddevice package and the PortAudio library (pip install sounddevice; on Debian also "
            "apt install libportaudio2). Without --play the speech is saved."
        ) from error
    return Player()


def _save(path: Path, audio: "Tensor", sample_rate: int) -> None:
    from csm_core.audio import write_wav

    write_wav(path, audio, sample_rate)


# --- other commands --------------------------------------------------------------------------------------------------


def _voices(args: argparse.Namespace) -> int:
    from csm_core.voices import list_voices

    folder = args.voices or args.settings.voices
    names = list_voices(folder)
    advice = (
        "no voices; a voice is a folder with sample.wav and transcript.txt inside the folder of CSM_VOICES or --voices"
    )
    _print(args, {"folder": str(folder) if folder else None, "voices": names}, "\n".join(names) or advice)
    return 0


def _convert(args: argparse.Namespace) -> int:
    with _progress("converting", args):
        from csm_core.model.checkpoint import convert

        folder = convert(args.source, args.target)
    size = sum(file.stat().st_size for file in folder.iterdir())
    _print(args, {"folder": str(folder), "bytes": size}, f"{folder}: {size / 1e6:.1f} MB")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from csm_core import load
    from csm_core.server.logs import log_as_json
    from csm_core.server.run import Address, serve

    settings: Settings = args.settings
    try:
        engine, limits = EngineConfig(slots=args.slots), ServerSettings.from_env()
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    settings = replace(settings, voices=args.voices or settings.voices, engine=engine)
    limits = replace(
        limits,
        voices=settings.voices,
        max_speeches=engine.slots + engine.queue_size,
        no_auth=args.no_auth,
        key_rate=args.key_rate,
        key_speeches=args.key_speeches,
        public_lists=args.public_lists,
        public_metrics=args.public_metrics,
        cors_origins=tuple(args.cors),
    )
    log_as_json(settings.log_level)
    address = Address(args.host, args.port, args.certificate, args.private_key)
    model, device = args.model or settings.model, args.device or settings.device
    return serve(limits, address, lambda: load(model, device, settings))


def _bench(args: argparse.Namespace) -> int:
    for file in (args.json, args.plot):
        _check_target(file)
    from csm_core.bench.command import carry_out

    shown = sys.stderr.isatty() if args.progress is None else args.progress
    text, found = carry_out(args, lambda part: print(f"measuring: {part}", file=sys.stderr) if shown else None)
    print(text)
    return 0 if found else 1


def _deploy_check(args: argparse.Namespace) -> int:
    from csm_core.deploy.lint import lint

    file = args.path / "cerebrium.toml" if args.path.is_dir() else args.path
    findings = lint(file)
    lines = [f"{f.severity}: {f.key + ': ' if f.key else ''}{f.message}" for f in findings] or [
        f"{file}: nothing to say"
    ]
    _print(args, {"file": str(file), "findings": [asdict(finding) for finding in findings]}, "\n".join(lines))
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _deploy_emulate(args: argparse.Namespace) -> int:
    from csm_core.deploy.emulate import serve

    token = args.token or secrets.token_urlsafe(16)
    if not args.token:
        print(f"token for this run: {token}", file=sys.stderr)
    serve(args.main, args.host, args.port, token, args.project, args.app)
    return 0


def _deploy_try(args: argparse.Namespace) -> int:
    """The whole way once: main.py in the emulator on a free port, called by the client script with a fresh token."""
    from csm_core.deploy.emulate import Emulator, running

    token = secrets.token_urlsafe(16)
    for name in ("main.py", "test_phrase.py"):
        if not (args.path / name).is_file():
            raise InvalidInputError(f"{args.path / name} does not exist; name the project's folder", "path")
    _check_target(args.out)
    with _progress("loading the model", args):
        emulator = Emulator(args.path / "main.py", token)
    with running(emulator) as url, _progress("speaking", args):
        client = [sys.executable, str(args.path / "test_phrase.py"), "--endpoint", f"{url}/generate_audio"]
        options = ["--token", token, "--text", args.text, "--out", str(args.out)]
        return subprocess.run([*client, *options], check=False).returncode


# --- terminal --------------------------------------------------------------------------------------------------------


def _print(args: argparse.Namespace, facts: dict[str, Any], line: str) -> None:
    print(json.dumps(facts) if args.json else line)


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "turn"


def _sentence(facts: dict[str, Any]) -> str:
    parts = [f"{facts['file'] or 'played'}: {facts['duration_seconds']:.2f} s of speech", f"RTF {facts['rtf']:.2f}"]
    if "ttfa_seconds" in facts:
        parts.append(f"first sound after {facts['ttfa_seconds']:.2f} s")
    parts += [f"{facts['model']} on {facts['device']}", f"seed {facts['seed']}"]
    if facts["finish_reason"] != "eos":
        parts.append(f"ended by {facts['finish_reason']}")
    return ", ".join(parts)


@contextlib.contextmanager
def _progress(what: str, args: argparse.Namespace, total: int | None = None, unit: str = "") -> Iterator[Advance]:
    """A line on stderr for work that takes longer than PATIENCE; its clock runs even while nothing is reported."""
    from tqdm import tqdm

    counted = f"{{n:.0f}}/{total}{unit}, " if total else f"{{n:.1f}}{unit}, " if unit else ""
    form = "{desc}: " + counted + "{elapsed}"
    shown = sys.stderr.isatty() if args.progress is None else args.progress
    bar = tqdm(desc=what, total=total, bar_format=form, disable=not shown, delay=PATIENCE, miniters=0, leave=False)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.5):
            bar.update(0)

    clock = threading.Thread(target=tick, name="csm-progress", daemon=True)
    if shown:
        clock.start()
    try:
        with bar:
            yield bar.update
    finally:
        done.set()


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "say": _say,
    "dialogue": _dialogue,
    "voices": _voices,
    "convert": _convert,
    "bench": _bench,
    "serve": _serve,
    "deploy check": _deploy_check,
    "deploy emulate": _deploy_emulate,
    "deploy try": _deploy_try,
}

if __name__ == "__main__":
    sys.exit(main())
