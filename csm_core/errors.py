"""The exceptions that callers of csm_core can meet. Knows nothing of HTTP; an entry point maps ``code`` to a status.

CsmError
├── InvalidInputError (also a ValueError)   the caller can mend it: text, number, audio, script
│   ├── PromptTooLongError                  text and context do not fit the model's window
│   ├── UnsupportedLanguageError            a language that the transcriber does not know
│   └── AudioDecodeError                    bytes that are no audio, too long, or of an unusable shape
├── CheckpointError                         the weights cannot be used
│   ├── GatedRepoError                      no access to a gated repository
│   ├── MissingFileError                    a file that the layout needs is not there
│   ├── CorruptFileError                    a truncated or unreadable file
│   ├── ShapeMismatchError                  tensors that do not fit the configuration
│   └── TokenizerMismatchError              a tokenizer that does not belong to the weights
├── InsufficientMemoryError                 the device has no room for this model with this many slots
├── MissingExtraError                       a part whose packages are not installed
├── TranscriptionError                      the speech recogniser, or the endpoint that is one, failed
├── SilentOutputError                       every take was silent
├── RequestTimeoutError                     the deadline passed
├── RequestCancelledError                   the caller gave up
├── EngineBusyError                         the queue is full; try again later
└── EngineError                             the engine failed or is closed
"""


class CsmError(Exception):
    """Base of all. ``str(error)`` is one sentence for the caller that says what to do; never a traceback."""

    code = "internal_error"


class InvalidInputError(CsmError, ValueError):
    """A value that the caller can mend. ``param`` names it."""

    code = "invalid_input"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(InvalidInputError):
    """Text and context need more positions than the model has. ``excess`` says by how many."""

    code = "prompt_too_long"

    def __init__(self, message: str, excess: int, param: str | None = "context") -> None:
        super().__init__(message, param)
        self.excess = excess


class AudioDecodeError(InvalidInputError):
    """Audio that cannot be read or is outside the limits."""

    code = "invalid_audio"


class UnsupportedLanguageError(InvalidInputError):
    """A language that this transcriber does not know; the message lists those that it does."""

    code = "unsupported_language"

    def __init__(self, message: str) -> None:
        super().__init__(message, "language")


class CheckpointError(CsmError):
    """The weights cannot be used as they are."""

    code = "checkpoint_error"


class GatedRepoError(CheckpointError):
    """The repository is gated and the token (if any) has no access."""


class MissingFileError(CheckpointError):
    """A file of the checkpoint layout is missing."""


class CorruptFileError(CheckpointError):
    """A file is truncated or not what its name says."""


class ShapeMismatchError(CheckpointError):
    """A tensor's shape contradicts the configuration."""


class TokenizerMismatchError(CheckpointError):
    """The tokenizer does not belong to the weights."""


class InsufficientMemoryError(CsmError):
    """Weights, caches and slots do not fit into what the device has free; the message says what would."""

    code = "insufficient_memory"


class MissingExtraError(CsmError):
    """A part that was asked for needs packages that are not installed; the message says which extra brings them."""

    code = "missing_extra"


class TranscriptionError(CsmError):
    """Speech could not be turned into text: the recogniser broke, or the endpoint refused."""

    code = "transcription_failed"


class SilentOutputError(CsmError):
    """Every take of a text was empty or silent."""

    code = "silent_output"


class RequestTimeoutError(CsmError):
    """The request's deadline passed before its speech was complete."""

    code = "timeout"


class RequestCancelledError(CsmError):
    """The request was cancelled by its caller."""

    code = "cancelled"


class EngineBusyError(CsmError):
    """All slots and the waiting queue are full."""

    code = "busy"


class EngineError(CsmError):
    """The engine failed or was closed; the message says which."""

    code = "engine_error"
