"""Speech to text. ``load_transcriber`` chooses one of three: pocketsphinx (English, its model comes with it), Whisper,
or an OpenAI-compatible endpoint. Each is imported when chosen, and loads its model when first used.

Knows nothing of how the speech was made, and no HTTP but that of the endpoint it calls.
"""

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from csm_core.asr.transcript import Passage, Transcriber, Transcript, srt, vtt
from csm_core.errors import MissingExtraError

__all__ = ["Passage", "Transcriber", "Transcript", "load_transcriber", "srt", "vtt"]

logger = logging.getLogger(__name__)


def load_transcriber(
    kind: str = "auto", *, model: str | None = None, device: str | None = None, api_key: str | None = None
) -> Transcriber:
    """``kind``: "pocketsphinx", "whisper", "openai:<base url>" (as ``openai:http://host:8000/v1``), or "auto": Whisper
    where its extra is installed, else pocketsphinx.

    ``model``: for Whisper a size ("base") or a folder, for an endpoint its name there. ``device``: Whisper's, "cpu" or
    "cuda". ``api_key``: the endpoint's. Raises MissingExtraError (it says what to install), ValueError for other kinds.
    """
    chosen = _choose() if kind == "auto" else kind
    if chosen == "pocketsphinx":
        transcriber: Transcriber = _module("sphinx", "pocketsphinx", "asr").SphinxTranscriber()
    elif chosen == "whisper":
        whisper = _module("whisper", "faster_whisper", "whisper")
        transcriber = whisper.WhisperTranscriber(model or whisper.DEFAULT_MODEL, device)
    elif chosen.startswith("openai:"):
        remote = _module("remote", "requests", "asr")
        transcriber = remote.RemoteTranscriber(chosen.removeprefix("openai:"), model or remote.DEFAULT_MODEL, api_key)
    else:
        raise ValueError(f"A transcriber is auto, pocketsphinx, whisper or openai:<base url>, not {kind!r}.")
    logger.info("transcriber: %s", chosen)
    return transcriber


def _choose() -> str:
    """Whoever installed Whisper wants it; nothing is downloaded for somebody who did not."""
    return "whisper" if find_spec("faster_whisper") else "pocketsphinx"


def _module(name: str, package: str, extra: str) -> Any:
    """One of the modules beside this one, whose ``package`` may not be there."""
    if find_spec(package) is None:
        raise MissingExtraError(f"This transcriber needs {package}: pip install 'csm-core[{extra}]'.")
    return import_module(f"csm_core.asr.{name}")
