"""Every command and Python block of the README, run in order in a copy of what a clone has, with the bundled voice.

What cannot run here is on a list, word for word, so that a new command is either run or argued about. The commands
speak some twenty times; those blocks are marked slow.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import soundfile

from csm_core import arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NEEDED = ["csm_core", "main.py", "cerebrium.toml", "requirements.txt", "test_phrase.py", "test_with_context.py"]

# Needs an account, or what the first `make` has done already.
NOT_RUN = {"pip install cerebrium", "cerebrium login", "cerebrium deploy", "make test", ". .venv/bin/activate"}
QUICK = {"csm deploy check"}  # commands that load no model
SERVERS = re.compile(r"csm (deploy emulate|serve) ")  # they stay: fixtures run them


@dataclass(frozen=True)
class Block:
    """One fenced block of the README, with its first line's number."""

    line: int
    language: str
    code: str

    @property
    def slow(self) -> bool:
        commands = [line for line in self.code.splitlines() if line not in NOT_RUN]
        return self.language == "sh" and not all(command in QUICK for command in commands)


def read_blocks(text: str) -> list[Block]:
    """Fenced blocks, those inside lists without their indentation."""
    fences = re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(text[: m.start()].count("\n") + 2, m[2], re.sub(rf"^{m[1]}", "", m[3], flags=re.MULTILINE))
        for m in fences
    ]


BLOCKS = read_blocks(README)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a clone that commands need, and an empty home."""
    folder = tmp_path_factory.mktemp("clone")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    programs = folder / "bin"
    programs.mkdir()
    for name, command in {"python": sys.executable, "csm": f"{sys.executable} -m csm_core"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    (folder / "home").mkdir()
    return folder


def environment(clone: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CSM_", "HF_", "CEREBRIUM_"))}
    return kept | {
        "HOME": str(clone / "home"),
        "PATH": f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "CSM_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the machine may be busy, and threads that wait for each other then take minutes
    }


def run(clone: Path, program: list[str]) -> str:
    done = subprocess.run(program, cwd=clone, env=environment(clone), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def listening(clone: Path, words: str, port: int) -> Iterator[str]:
    """host:port of a server, started by the README's own command with ``words``, on a free port instead of its own."""
    command = next(line for line in README.splitlines() if words in line)
    assert f"--port {port}" in command
    with socket.create_server(("127.0.0.1", 0)) as free:
        command = "exec env " + command.replace(f"--port {port}", f"--port {(port := free.getsockname()[1])}")
    server = subprocess.Popen(["bash", "-c", command], cwd=clone, env=environment(clone), stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert server.poll() is None, server.stderr and server.stderr.read()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture(scope="module")
def emulator(clone: Path) -> Iterator[str]:
    with listening(clone, "csm deploy emulate", 8000) as address:
        yield address


@pytest.fixture(scope="module")
def server(clone: Path) -> Iterator[str]:
    with listening(clone, "csm serve", 8001) as address:
        for _ in range(300):
            if requests.get(f"http://{address}/ready", timeout=10).ok:
                break
            time.sleep(0.2)
        yield address


def as_run(block: Block, request: pytest.FixtureRequest) -> str:
    """The block with what differs here: the port, the platform's address, what a Makefile would wrap."""
    lines = [line for line in block.code.splitlines() if line not in NOT_RUN and not SERVERS.search(line)]
    if shutil.which("curl") is None:
        lines = [line for line in lines if not line.startswith("curl ")]
    code = "\n".join(lines)
    code = re.sub(r"^make run TEXT=(.*)$", r"CSM_MODEL=bundled csm deploy try --text \1", code, flags=re.MULTILINE)
    if "127.0.0.1:8001" in code:
        code = code.replace("127.0.0.1:8001", request.getfixturevalue("server"))
    if "127.0.0.1:8000" in code or "api.cerebrium.ai" in code:
        address = request.getfixturevalue("emulator")
        code = code.replace("127.0.0.1:8000", address).replace("CEREBRIUM_TOKEN=...", "CEREBRIUM_TOKEN=secret")
        code = code.replace("https://api.cerebrium.ai/v4/p-xxxx", f"http://{address}/v4/p-local")
    return code


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b, id=f"line {b.line}", marks=[pytest.mark.slow] if b.slow else [])
        for b in BLOCKS
        if b.language == "sh"
    ],
)
def test_commands_run(block: Block, clone: Path, request: pytest.FixtureRequest) -> None:
    run(clone, ["bash", "-euo", "pipefail", "-c", as_run(block, request)])
    for name in re.findall(r"(?:-o|--out) (\S+\.wav)", block.code):
        assert soundfile.info(clone / name).duration > 0.3, name


@pytest.mark.parametrize("block", [pytest.param(b, id=f"line {b.line}") for b in BLOCKS if b.language == "python"])
def test_python_runs(block: Block, clone: Path, request: pytest.FixtureRequest) -> None:
    run(clone, [sys.executable, "-W", "error", "-c", as_run(block, request)])


def test_nothing_is_left_out() -> None:
    """Blocks of other kinds hold no commands, and what is not run is still in the README."""
    assert {block.language for block in BLOCKS} <= {"sh", "python", "text"}
    lines = {line.strip() for line in README.splitlines()}
    assert lines >= NOT_RUN
    assert README.count("```") == 2 * len(BLOCKS)
    assert sum(block.language == "python" for block in BLOCKS) >= 2


def csm_commands(text: str) -> list[list[str]]:
    """The words after ``csm`` of every line of the sh blocks that calls it."""
    lines = [line for block in read_blocks(text) if block.language == "sh" for line in block.code.splitlines()]
    words = [shlex.split(line) for line in lines if re.search(r"(^|[ |])csm ", line)]
    return [line[line.index("csm") + 1 :] for line in words]


def test_commands_are_known() -> None:
    """Words and options alone, at once; the slow tests run them."""
    commands = [arguments.read(words).command for words in csm_commands(README)]
    assert {"say", "dialogue", "voices", "convert", "serve", "deploy check", "deploy emulate", "deploy try"} == set(
        commands
    )
    with pytest.raises(SystemExit):
        arguments.read(csm_commands("```sh\nCSM_MODEL=x csm say 'a b' --sead 1\n```\n")[0])


def test_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE), target
    assert '$(BIN)/csm deploy try --text "$$CSM_TEXT"' in makefile  # what the test runs in its place
    assert "$(BIN)/python -m pytest" in makefile


def test_the_tree_is_true() -> None:
    tree = next(block.code for block in BLOCKS if block.language == "text" and "csm_core/" in block.code)
    entries = re.findall(r"^( *)(\S+?(?:, \S+?)*)(?:  +|$)", tree, re.MULTILINE)
    paths = [("csm_core/" if indent else "") + name for indent, names in entries for name in names.split(", ")]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    listed = " ".join(tree.split())
    files = [
        file.name for file in (ROOT / "csm_core").iterdir() if not file.name.startswith("_") and file.name != "py.typed"
    ]
    assert [name for name in files if name not in listed] == []


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert len(targets) >= 3
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_blocks_are_read() -> None:
    text = "x\n```sh\na\n```\n1. y\n\n   ```python\n   b\n     c\n   ```\n"
    assert read_blocks(text) == [Block(3, "sh", "a\n"), Block(8, "python", "b\n  c\n")]
    assert Block(1, "sh", "csm deploy check\nmake test\n").slow is False
    assert Block(1, "sh", "csm deploy check\ncsm say x\n").slow is True
