"""Scripts: who speaks under which number, and what a wrong script is told."""

import json
from pathlib import Path

import pytest

from csm_core.dialogue import Turn, read_line, read_script
from csm_core.errors import InvalidInputError


def turns(folder: Path, content: str | bytes, name: str = "script.txt") -> list[Turn]:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_script(file)


def test_lines(tmp_path: Path) -> None:
    script = "\ufeff# a comment\nAnna: Hello: you.\n\n  Ben :  Hi.  \r\nAnna: Well\n"
    assert turns(tmp_path, script) == [Turn("Anna", 0, "Hello: you."), Turn("Ben", 1, "Hi."), Turn("Anna", 0, "Well")]


def test_json(tmp_path: Path) -> None:
    script = json.dumps([{"speaker": 1, "text": "Hello."}, {"speaker": " Anna ", "text": "Hi."}])
    assert turns(tmp_path, script, "script.JSON") == [Turn("1", 1, "Hello."), Turn("Anna", 0, "Hi.")]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ("ab", [0, 1]),
        ("a0b", [1, 0, 2]),
        ("10a", [1, 0, 2]),
        ("a1b0c", [2, 1, 3, 0, 4]),
        ("aa", [0, 0]),
        ("77a", [7, 7, 0]),
    ],
)
def test_a_number_is_itself_and_names_get_the_free_ones(tmp_path: Path, names: str, numbers: list[int]) -> None:
    assert [turn.speaker for turn in turns(tmp_path, "".join(f"{name}: x\n" for name in names))] == numbers


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [
        ("", "a.txt", "no turns"),
        ("# only this\n", "a.txt", "no turns"),
        ("Anna: Hello.\nno colon here\n", "a.txt", "line 2"),
        (": Hello.", "a.txt", "line 1"),
        ("Anna:  ", "a.txt", "line 1"),
        (b"\xff\xfe\x00", "a.txt", "UTF-8"),
        ("[", "a.json", "not JSON"),
        ("[" * 100_000, "a.json", "not JSON"),
        ("[]", "a.json", "no turns"),
        ("{}", "a.json", "must be a list"),
        ("[1]", "a.json", "must be a list"),
        ('[{"speaker": "A"}]', "a.json", "must be a list"),
        ('[{"speaker": "A", "text": "x", "voice": "y"}]', "a.json", "must be a list"),
        ('[{"speaker": true, "text": "x"}]', "a.json", "must be a list"),
        ('[{"speaker": -1, "text": "x"}]', "a.json", "must be a list"),
        ('[{"speaker": " ", "text": "x"}]', "a.json", "must be a list"),
        ('[{"speaker": "A", "text": 1}]', "a.json", "must be a list"),
    ],
)
def test_wrong_scripts(tmp_path: Path, content: str | bytes, name: str, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=complaint) as caught:
        turns(tmp_path, content, name)
    assert name in str(caught.value)
    assert caught.value.param == "script"


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_script(tmp_path / "none.txt")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_script(tmp_path)


def test_one_line() -> None:
    assert read_line("1: Good\nmorning.", 0) == Turn("1", 1, "Good\nmorning.")
    assert read_line("Good: morning.", 3) == Turn("3", 3, "Good: morning.")
    assert read_line("12:30 is late.", 3) == Turn("3", 3, "12:30 is late.")
