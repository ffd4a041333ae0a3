#!/usr/bin/env python3
"""Speak a text in this process with real context, to hear what a deployment will do before it is redeployed.

    python test_with_context.py                              # two turns are spoken first and become the context
    python test_with_context.py --no-context --text "The same sentence on its own."
    python test_with_context.py --context anna.wav "What Anna says in the file." --text "And what she says next."

Exit codes: 0 spoken; 1 it failed; 2 the input cannot be used.
"""

import argparse
import sys
from pathlib import Path

import csm_core
from csm_core.audio import read_audio, write_wav
from csm_core.config import Settings
from csm_core.dialogue import read_line

OPENING = [(0, "Did you close the window?"), (1, "Yes, just before the rain came.")]


def main(argv: list[str] | None = None) -> int:
    args = read_options(argv)
    try:
        speak(args)
    except (csm_core.InvalidInputError, ValueError) as error:
        return fail(str(error), 2)
    except csm_core.CsmError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}", 1)
    return 0


def fail(sentence: str, code: int) -> int:
    print(f"test_with_context: {sentence}", file=sys.stderr)
    return code


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test_with_context.py", description="Speak a text with real context.")
    parser.add_argument("--text", default="Then we can leave it as it is.", help="what is said")
    parser.add_argument("--speaker", type=int, default=0, help="who says it (0)")
    parser.add_argument("--no-context", action="store_true", help="speak the text on its own")
    parser.add_argument(
        "--context",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE TRANSCRIPT",
        help="earlier turns: sound file and what is said in it, `1: Hello.` if by another speaker; any number of pairs",
    )
    parser.add_argument("--out", "-o", type=Path, default=Path("with_context.wav"), help="the file to write")
    parser.add_argument("--model", help="auto, bundled, csm-1b, a folder or a hub id (default: CSM_MODEL, or auto)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: CSM_DEVICE, or what is there)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed speaks the same way again (0)")
    args = parser.parse_args(argv)
    if len(args.context) % 2:
        parser.error("--context takes pairs: a sound file and what is said in it")
    if args.context and args.no_context:
        parser.error("--context and --no-context exclude each other")
    return args


def speak(args: argparse.Namespace) -> None:
    settings = Settings.from_env()
    with csm_core.load(args.model or settings.model, args.device, settings) as generator:
        print(f"model: {generator.model_name} on {generator.device}")
        context = read_context(generator, args)
        for segment in context:
            seconds = segment.audio.numel() / generator.sample_rate
            print(f"context: speaker {segment.speaker}, {seconds:.2f} s: {segment.text}")
        speech = generator.speak(args.text, args.speaker, context, seed=args.seed)
        write_wav(args.out, speech.audio, speech.sample_rate)
        print(f"speech: speaker {args.speaker}, {speech.duration_seconds:.2f} s: {args.text}")
        print(f"{args.out}: RTF {speech.rtf:.2f}, seed {speech.seed}, ended by {speech.finish_reason}")


def read_context(generator: csm_core.Generator, args: argparse.Namespace) -> list[csm_core.Segment]:
    """The files that were given, nothing, or two turns that the model speaks now, the second in answer to the first."""
    context: list[csm_core.Segment] = []
    if args.context:
        for file, transcript in zip(args.context[::2], args.context[1::2], strict=True):
            turn = read_line(transcript, args.speaker)
            context.append(csm_core.Segment(turn.speaker, turn.text, read_audio(file, generator.sample_rate)))
    elif not args.no_context:
        for speaker, text in OPENING:
            audio = generator.generate(text, speaker, context, seed=args.seed)
            context.append(csm_core.Segment(speaker, text, audio))
    return context


if __name__ == "__main__":
    sys.exit(main())
