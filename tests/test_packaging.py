"""What a user installs: the wheel's content, and that the two lists of dependencies agree."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    (requirement := Requirement(line.split("#")[0])).name: requirement
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line.split("#")[0].strip()
}
# Needed by the command line only, which a deployment does not run.
NOT_DEPLOYED = {"tqdm"}


def test_a_wheel_carries_the_package_and_its_voice(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = next(wheel.read(name) for name in wheel.namelist() if name.endswith("entry_points.txt"))
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "csm_core").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == package
    assert {"csm_core/py.typed", "csm_core/deploy/emulate.py", "csm_core/train/judge_sentences.txt"} <= names
    assert b"csm = csm_core.cli:main" in entry_points


def test_pins_are_exact_and_within_the_ranges() -> None:
    assert all(re.fullmatch(r"==[0-9.]+", str(pin.specifier)) for pin in PINS.values())
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    wanted += [Requirement(line) for lines in PROJECT["optional-dependencies"].values() for line in lines]
    outside = [
        f"{PINS[want.name]} is not {want}"
        for want in wanted
        if want.name in PINS and not want.specifier.contains(str(PINS[want.name].specifier).removeprefix("=="))
    ]
    assert outside == []


def test_a_deployment_gets_every_dependency() -> None:
    assert {Requirement(line).name for line in PROJECT["dependencies"]} - NOT_DEPLOYED <= set(PINS)


def test_every_dependency_has_a_reason() -> None:
    lists = (
        (ROOT / "pyproject.toml")
        .read_text(encoding="utf-8")
        .split("dependencies = [", 1)[1]
        .split("[project.scripts]")[0]
    )
    lines = [line.strip() for line in lists.splitlines() if re.match(r'\s+"', line)]
    bare = [line for line in lines if "#" not in line and "csm-core[" not in line]
    assert len(lines) > 10
    assert bare == []
