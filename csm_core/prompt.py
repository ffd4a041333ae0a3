"""Segments, the context budget, and the frames of a prompt.

The budget is plain arithmetic on lengths (``fit_context``); tensors appear only where frames are laid out. Knows
neither the tokenizer nor the codec: ids and codes come in ready.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from csm_core.errors import InvalidInputError, PromptTooLongError
from csm_core.model.csm import ABSENT
from csm_core.text import check_speaker

# How many places older a turn of the speaker who talks next may be and still go before somebody else's turn.
SAME_SPEAKER_LEAD = 2


@dataclass(frozen=True, eq=False)
class Segment:
    """One turn of a conversation: who said what, and how it sounded (mono PCM ``[samples]`` at the model's rate).

    Fields in the order of the original's ``Segment``. Raises InvalidInputError for anything that is not such a turn.
    """

    speaker: int
    text: str
    audio: torch.Tensor

    def __post_init__(self) -> None:
        check_speaker(self.speaker)
        if not isinstance(self.text, str):
            raise InvalidInputError("A segment's text must be a string: what is said in its audio.", "context")
        if not isinstance(self.audio, torch.Tensor) or not self.audio.is_floating_point():
            raise InvalidInputError("A segment's audio must be a tensor of floats in -1..1.", "context")
        if self.audio.ndim != 1 or not self.audio.numel():
            shape = tuple(self.audio.shape)
            raise InvalidInputError(
                f"A segment's audio must be mono [samples] and not empty; it is {shape}.", "context"
            )
        if not torch.isfinite(self.audio).all():
            raise InvalidInputError("A segment's audio holds NaN or infinite samples.", "context")


class Turn(NamedTuple):
    """What the budget knows of a segment: its length in positions, who speaks, whether it is the voice reference."""

    length: int
    speaker: int
    is_voice: bool = False


@dataclass(frozen=True, eq=False)
class EncodedSegment:
    """A segment as the model reads it: text ids with BOS and EOS, codes int64 ``[frames, K]``."""

    text_ids: Sequence[int]
    codes: torch.Tensor
    speaker: int
    is_voice: bool = False

    @property
    def turn(self) -> Turn:
        return Turn(segment_length(len(self.text_ids), self.codes.shape[0]), self.speaker, self.is_voice)


def segment_length(text_tokens: int, audio_frames: int) -> int:
    """Positions that a segment takes in a prompt: its text, its audio, and the EOS frame that closes the audio."""
    return text_tokens + audio_frames + 1


def fit_context(turns: Sequence[Turn], text_length: int, answer_frames: int, speaker: int, window: int) -> list[int]:
    """Choose which turns go into the prompt; returns their indices, oldest first, as they stood.

    All lengths are positions: ``text_length`` of the text to speak, ``answer_frames`` reserved for the answer,
    ``window`` of the model. Voice turns always stay. The others are taken whole, most relevant first, each if it still
    fits: first the newest turn, then by age, where a turn of ``speaker`` counts as two places younger than it is; of
    two that tie, the newer. Raises PromptTooLongError when voice, text and answer alone exceed the window.
    """
    voice = [index for index, turn in enumerate(turns) if turn.is_voice]
    voice_length = sum(turns[index].length for index in voice)
    room = window - text_length - answer_frames - voice_length
    if room < 0:
        advice = "the text or the voice sample" if voice else "the text"
        raise PromptTooLongError(
            f"The prompt does not fit: text {text_length} + voice {voice_length} + answer {answer_frames} positions "
            f"are {-room} more than the model's {window}. Shorten {advice} or ask for a shorter answer.",
            excess=-room,
            param="voice" if voice_length > text_length else "text",
        )
    others = [index for index, turn in enumerate(turns) if not turn.is_voice]
    age = {index: place for place, index in enumerate(reversed(others))}

    def relevance(index: int) -> tuple[int, int]:
        lead = SAME_SPEAKER_LEAD if turns[index].speaker == speaker else 0
        return (age[index] - lead if age[index] else -SAME_SPEAKER_LEAD, age[index])

    kept = voice
    for index in sorted(others, key=relevance):
        if turns[index].length <= room:
            room -= turns[index].length
            kept.append(index)
    return sorted(kept)


def build_prompt(segments: Sequence[EncodedSegment], text_ids: Sequence[int], num_codebooks: int) -> torch.Tensor:
    """Frames int64 ``[T, num_codebooks + 1]``: of each segment its text, audio and EOS frame; then the text to speak.

    The layout is the original's (SesameAILabs/csm, ``generator.py``), with ABSENT where its mask is false.
    """
    parts = []
    for segment in segments:
        parts += [_text_frames(segment.text_ids, num_codebooks), _audio_frames(segment.codes, num_codebooks)]
    parts.append(_text_frames(text_ids, num_codebooks))
    return torch.cat(parts)


def _text_frames(ids: Sequence[int], num_codebooks: int) -> torch.Tensor:
    frames = torch.full((len(ids), num_codebooks + 1), ABSENT, dtype=torch.int64)
    frames[:, -1] = torch.tensor(ids, dtype=torch.int64)
    return frames


def _audio_frames(codes: torch.Tensor, num_codebooks: int) -> torch.Tensor:
    frames = torch.full((codes.shape[0] + 1, num_codebooks + 1), ABSENT, dtype=torch.int64)
    frames[:-1, :-1] = codes
    frames[-1, :-1] = 0  # EOS
    return frames
