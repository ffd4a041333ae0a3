"""CSM on Cerebrium: `cerebrium deploy` publishes each public function here as POST .../v4/{project}/{app}/{function}.

The model is loaded when the platform imports this file (on a worker thread, inside the initialisation timeout). A load
that fails raises, so the deployment fails instead of hiding it. Everything that is not an endpoint has an underscore:
the platform publishes every other function it finds in this module, imported ones included.
"""

import logging as _logging
import os as _os

# Read by huggingface_hub when it is imported: several connections per file, for 3 to 6 GB on a cold start.
_os.environ.setdefault("HF_HUB_ENABLE_HF_TRANSFER", "1")

import csm_core as _csm
from csm_core.config import Settings as _Settings
from csm_core.deploy import cortex as _cortex

_settings = _Settings.from_env()
_logging.basicConfig(level=_settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
_generator = _csm.load(_settings.model, settings=_settings)

# No parameter is required and None is the default everywhere: whatever the platform does about missing ones, a call
# reaches our own checks. Bad input returns {"status_code": 422, "error": {"code", "message", "param"}}.


def generate_audio(
    text=None,
    speaker=0,
    max_audio_length_ms=None,
    temperature=None,
    topk=None,
    context=None,
    voice=None,
    seed=None,
):
    """Speak `text`: {"audio_data": base64 WAV, "format", "encoding", "duration_seconds", "processing_time_seconds"} ...

    `context`: earlier turns, oldest first, as [{"text", "speaker", "audio": base64}]. `voice`: the name of a voice that
    is deployed. The same `seed` speaks the same way again.
    """
    return _cortex.generate_audio(
        _generator, _cortex.Call(text, speaker, max_audio_length_ms, temperature, topk, context, voice, seed)
    )


def stream_audio(
    text=None,
    speaker=0,
    max_audio_length_ms=None,
    temperature=None,
    topk=None,
    context=None,
    voice=None,
    seed=None,
):
    """As generate_audio, in server-sent events while it speaks: {"audio": base64 16-bit PCM, "sample_rate", "done"}."""
    return _cortex.stream_audio(
        _generator, _cortex.Call(text, speaker, max_audio_length_ms, temperature, topk, context, voice, seed)
    )


def transcribe(audio=None, language="en"):  # noqa: ARG001  the contract's parameters
    """Speech to text: not in this version."""
    return _cortex.not_implemented("This version speaks only; it cannot transcribe.")


def health():
    """The model that runs here and whether it still does."""
    return _cortex.health(_generator)
