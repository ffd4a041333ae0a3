"""Scripts of a dialogue: who says what, in order, under which speaker number.

Two forms, told apart by the file's name: lines ``Anna: Hello.`` (``#`` begins a comment) and, in ``*.json``, a list of
``{"speaker": "Anna", "text": "Hello."}``. Knows no model and no audio.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from csm_core.errors import InvalidInputError


@dataclass(frozen=True)
class Turn:
    """One turn: the speaker's name in the script, their number for the model, what they say."""

    name: str
    speaker: int
    text: str


def read_script(path: Path) -> list[Turn]:
    """The turns of a script, in order; at least one. Raises InvalidInputError that says where it is wrong.

    A name that is a number is that speaker; other names get the free numbers from 0 in order of appearance.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}.", "script") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is not UTF-8 text.", "script") from error
    lines = _json_turns(path, content) if path.suffix.lower() == ".json" else _text_turns(path, content)
    if not lines:
        raise InvalidInputError(f"{path} holds no turns; write lines such as `Anna: Hello.`", "script")
    numbers = _number([name for name, _ in lines])
    return [Turn(name, numbers[name], text) for name, text in lines]


def read_line(line: str, speaker: int) -> Turn:
    """One turn on a command line: ``1: Good morning.`` is said by 1, a text without a number by ``speaker``."""
    numbered = re.fullmatch(r"\s*(\d+):\s+(.+)", line, re.DOTALL)
    return Turn(numbered[1], int(numbered[1]), numbered[2]) if numbered else Turn(str(speaker), speaker, line)


def _number(names: list[str]) -> dict[str, int]:
    names = list(dict.fromkeys(names))
    numbers = {name: int(name) for name in names if name.isdecimal()}
    free = iter(sorted(set(range(2 * len(names))) - set(numbers.values())))
    return numbers | {name: next(free) for name in names if name not in numbers}


def _text_turns(path: Path, content: str) -> list[tuple[str, str]]:
    turns = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, text = line.partition(":")
        if not name.strip() or not text.strip():
            raise InvalidInputError(f"{path}, line {number}: write who speaks and what, as in `Anna: Hello.`", "script")
        turns.append((name.strip(), text.strip()))
    return turns


def _json_turns(path: Path, content: str) -> list[tuple[str, str]]:
    try:
        turns = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not JSON: {error}.", "script") from error
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise InvalidInputError(f'{path} must be a list of {{"speaker": "Anna", "text": "Hello."}}.', "script")
    return [(str(turn["speaker"]).strip(), turn["text"]) for turn in turns]


def _is_turn(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"speaker", "text"} or not isinstance(value["text"], str):
        return False
    speaker = value["speaker"]
    return bool(speaker.strip()) if isinstance(speaker, str) else type(speaker) is int and speaker >= 0
