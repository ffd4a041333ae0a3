"""The words of the ``csm`` command: its commands, their options and their help. Knows nothing of what they do.

``read`` answers with a namespace whose ``command`` is the command's name, "say" or "deploy check".
"""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

EXIT_CODES = """exit codes:
  0    done
  1    it failed: checkpoint, engine, silent speech, errors found by `deploy check`
  2    the input cannot be used: an option, a text, a script, a sound file
  130  interrupted
"""

_AddCommand = Callable[[str, str], ArgumentParser]


def read(argv: Sequence[str] | None) -> Namespace:
    """Parse a command line (None: this process's). A wrong one ends the process with exit code 2, as is usual."""
    parser = ArgumentParser(
        prog="csm",
        description="Speech from text, with the conversation as context.",
        epilog=EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"csm {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    deploy = commands.add_parser("deploy", help="check, emulate and try a deployment")
    deploy_commands = deploy.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> ArgumentParser:
        where = deploy_commands if name.startswith("deploy ") else commands
        command = where.add_parser(name.removeprefix("deploy "), help=text, description=text)
        command.set_defaults(command=name)
        if name not in {"bench", "serve"}:  # one prints a table and writes JSON to a file, the other's log is JSON
            command.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
        command.add_argument(
            "--progress", action=BooleanOptionalAction, help="progress on stderr (default: on a terminal)"
        )
        command.add_argument("-v", "--verbose", action="store_true", help="show the log, at CSM_LOG_LEVEL (INFO)")
        return command

    _add_say(add)
    _add_dialogue(add)
    _add_voices_and_convert(add)
    _add_bench(add)
    _add_serve(add)
    _add_deploy(add)
    return parser.parse_args(argv)


def _version() -> str:
    try:
        return metadata.version("csm-core")
    except metadata.PackageNotFoundError:  # run from a folder, as a deployment does
        return "(not installed)"


def _add_model_options(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--model", help="auto, bundled, csm-1b, a folder, or owner/name on the Hub (default: CSM_MODEL, or auto)")
    add("--device", help="cuda, mps or cpu (default: CSM_DEVICE, or what is there)")
    add("--voice", help="a voice's name, or its folder with a slash in it (./anna)")
    add("--voices", type=Path, metavar="FOLDER", help="where named voices are (default: CSM_VOICES)")
    add("--seed", type=int, help="the same seed speaks the same way again (default: random)")
    add("--temperature", type=float, help="0 to 2; 0 takes the likeliest (default: the model's)")
    add("--topk", type=int, help="choose among this many codes (default: the model's)")


def _add_say(add_command: _AddCommand) -> None:
    command = add_command("say", "speak a text")
    _add_model_options(command)
    add = command.add_argument
    add("text", help="what is said; - reads it from stdin")
    add("-o", "--out", type=Path, help="the WAV to write (speech.wav, or none with --play)")
    add("--speaker", type=int, default=0, help="number of the speaker (0)")
    context = "an earlier turn and what is said in it, as `1: Hello.` if by another speaker; may be repeated"
    add("--context", nargs=2, action="append", default=[], metavar=("FILE", "TEXT"), help=context)
    add("--stream", action="store_true", help="write and play each chunk as soon as it is made")
    add("--play", action="store_true", help="play it")


def _add_dialogue(add_command: _AddCommand) -> None:
    command = add_command("dialogue", "speak a script, each turn with the earlier ones as context")
    _add_model_options(command)
    command.add_argument("script", type=Path, help="lines `Anna: Hello.`, or a .json list of speaker and text")
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--out", type=Path, help="one WAV with all turns")
    target.add_argument("--out-dir", type=Path, metavar="FOLDER", help="one WAV per turn in this folder")


def _add_voices_and_convert(add_command: _AddCommand) -> None:
    voices = add_command("voices", "list the voices of a folder")
    voices.add_argument("--voices", type=Path, metavar="FOLDER", help="where the voices are (default: CSM_VOICES)")
    convert = add_command("convert", "save a checkpoint again as one bf16 file, for fast starts")
    convert.add_argument("source", help="bundled, csm-1b, a folder, or owner/name on the Hub")
    convert.add_argument("target", type=Path, help="the folder to write")


def _add_bench(add_command: _AddCommand) -> None:
    command = add_command("bench", "measure latency, speed and streams per device, or search for the settings to use")
    add = command.add_argument
    add("--model", help="auto, bundled, csm-1b, a folder, or owner/name on the Hub (default: CSM_MODEL, or auto)")
    add("--random-weights", metavar="SIZE", help="random weights of this size, no download: csm-1b, small or tiny")
    add("--device", help="cuda, mps or cpu (default: CSM_DEVICE, or what is there)")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: bfloat16 on cuda, else float32)")
    add("--slots", type=int, help="callers at once, at most (64 on cuda, else 8)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig or Settings")
    add("--peer", action="append", default=[], choices=["transformers", "sesame"], help="measure beside it, in turns")
    add("--only", metavar="SECTION,...", help="floor, batch, ttfa, launches, streams, memory, parts, speech, peers")
    add("--budget", type=float, default=480.0, metavar="SECONDS", help="for everything after loading (480)")
    add(
        "--voice-seconds", type=float, default=20.0, metavar="S", help="length of the voices that TTFA is measured with"
    )
    add("--seed", type=int, default=0, help="of the random arrivals (0)")
    add("--cores", type=int, metavar="N", help="use N cores of the CPU only")
    add("--threads", type=int, metavar="N", help="torch's threads (default: as `csm say` has them)")
    add("--machine", metavar="NAME", help="what to call this machine (default: its processor's or GPU's name)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="draw latency against load as PNG; needs csm-core[bench]")
    add("--target-ttfa-ms", type=float, default=300.0, metavar="MS", help="the first sound that callers accept (300)")
    add("--recommend", action="store_true", help="search for the settings that serve most callers within the targets")
    add("--target-rtf", type=float, default=0.9, metavar="X", help="for --recommend (0.9)")
    choice = "for --recommend: what to try, as chunk_schedule=1,2,4|1,1,2 (default: what is known to matter)"
    add("--try", action="append", default=[], dest="choices", metavar="NAME=A|B", help=choice)


def _add_serve(add_command: _AddCommand) -> None:
    command = add_command("serve", "serve speech over HTTP, OpenAI's speech API and the endpoint's own, until stopped")
    add = command.add_argument
    add("--model", help="auto, bundled, csm-1b, a folder, or owner/name on the Hub (default: CSM_MODEL, or auto)")
    add("--device", help="cuda, mps or cpu (default: CSM_DEVICE, or what is there)")
    add("--voices", type=Path, metavar="FOLDER", help="where named voices are (default: CSM_VOICES)")
    add("--slots", type=int, default=4, help="speeches at once; others wait (4)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1); any other one needs CSM_API_KEYS")
    add("--port", type=int, default=8000, help="port to listen on (8000)")
    add("--no-auth", action="store_true", help="let everybody in who can reach the address")
    add("--key-rate", metavar="RATE", help="requests of one key, as 60/minute (default: no limit)")
    add("--key-speeches", type=int, metavar="N", help="speeches of one key at once (default: no limit)")
    add("--public-lists", action="store_true", help="list models and voices without a key, as Open WebUI asks for them")
    add("--public-metrics", action="store_true", help="show /metrics without a key")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="a web page's origin that may call; repeatable")
    add("--certificate", metavar="FILE", help="PEM file for TLS")
    add("--private-key", metavar="FILE", help="its key, if it is not in the same file")


def _add_deploy(add_command: _AddCommand) -> None:
    check = add_command("deploy check", "lint a cerebrium.toml before it is deployed")
    check.add_argument("path", type=Path, nargs="?", default=Path(), help="the file or its folder (.)")

    emulate = add_command("deploy emulate", "run main.py locally, as the platform does, until interrupted")
    emulate.set_defaults(verbose=True)  # a server without a log is a riddle
    add = emulate.add_argument
    add("main", type=Path, nargs="?", default=Path("main.py"), help="the file to run (main.py)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on (8000)")
    add("--token", help="the bearer token that callers must send (default: a random one, printed)")
    add("--project", default="p-local", help="the project in the path (p-local)")
    add("--app", default="csm", help="the app in the path (csm)")

    attempt = add_command("deploy try", "emulate the deployment, call it once with test_phrase.py, stop it")
    add = attempt.add_argument
    add("path", type=Path, nargs="?", default=Path(), help="the folder of main.py and test_phrase.py (.)")
    add("--text", default="The train leaves at half past seven.", help="what is said")
    add("-o", "--out", type=Path, default=Path("speech.wav"), help="the WAV to write (speech.wav)")
