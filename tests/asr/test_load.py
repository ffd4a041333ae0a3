"""Which transcriber is chosen, and what is said when its packages are not there."""

import importlib.util
import subprocess
import sys

import pytest

from csm_core import asr
from csm_core.asr.sphinx import SphinxTranscriber
from csm_core.errors import MissingExtraError


def only_with(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(asr, "find_spec", lambda name: importlib.util.find_spec("json") if name in packages else None)


def test_by_default_it_is_the_one_that_needs_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    only_with(monkeypatch, "pocketsphinx")
    assert isinstance(asr.load_transcriber(), SphinxTranscriber)
    assert isinstance(asr.load_transcriber("pocketsphinx"), SphinxTranscriber)


def test_whoever_installed_whisper_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    only_with(monkeypatch, "pocketsphinx", "faster_whisper")
    assert asr._choose() == "whisper"


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("auto", "pocketsphinx", "asr"),
        ("pocketsphinx", "pocketsphinx", "asr"),
        ("whisper", "faster_whisper", "whisper"),
        ("openai:http://127.0.0.1/v1", "requests", "asr"),
    ],
)
def test_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str, extra: str
) -> None:
    only_with(monkeypatch)
    with pytest.raises(MissingExtraError, match=rf"{package}: pip install 'csm-core\[{extra}\]'"):
        asr.load_transcriber(kind)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="openai:<base url>"):
        asr.load_transcriber("google")


def test_importing_it_loads_no_recogniser() -> None:
    heavy = "{'torch', 'pocketsphinx', 'requests', 'faster_whisper'}"
    program = f"import sys, csm_core.asr; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
