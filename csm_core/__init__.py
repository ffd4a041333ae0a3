"""Sesame's Conversational Speech Model (CSM) as a package: text and earlier turns in, speech out. Public names only.

What needs torch is imported from its module when it is first asked for (PEP 562): ``import csm_core`` itself takes no
model library, so a command's help and a client that wants only the errors start at once.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from csm_core.errors import (
    AudioDecodeError,
    CheckpointError,
    CorruptFileError,
    CsmError,
    EngineBusyError,
    EngineError,
    GatedRepoError,
    InsufficientMemoryError,
    InvalidInputError,
    MissingExtraError,
    MissingFileError,
    PromptTooLongError,
    RequestCancelledError,
    RequestTimeoutError,
    ShapeMismatchError,
    SilentOutputError,
    TokenizerMismatchError,
    TranscriptionError,
    UnsupportedLanguageError,
)

if _TYPE_CHECKING:
    from csm_core.generator import Generator, load, load_csm_1b
    from csm_core.prompt import Segment
    from csm_core.takes import Speech

_LATE = {
    "Generator": "csm_core.generator",
    "Segment": "csm_core.prompt",
    "Speech": "csm_core.takes",
    "load": "csm_core.generator",
    "load_csm_1b": "csm_core.generator",
}

__all__ = [
    "AudioDecodeError",
    "CheckpointError",
    "CorruptFileError",
    "CsmError",
    "EngineBusyError",
    "EngineError",
    "GatedRepoError",
    "Generator",
    "InsufficientMemoryError",
    "InvalidInputError",
    "MissingExtraError",
    "MissingFileError",
    "PromptTooLongError",
    "RequestCancelledError",
    "RequestTimeoutError",
    "Segment",
    "ShapeMismatchError",
    "SilentOutputError",
    "Speech",
    "TokenizerMismatchError",
    "TranscriptionError",
    "UnsupportedLanguageError",
    "load",
    "load_csm_1b",
]


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(_LATE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
