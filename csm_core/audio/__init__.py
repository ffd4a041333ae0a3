"""Audio at the edge: bytes of any sound format <-> mono float32 PCM tensors ``[samples]``.

Here are whole clips, which need soundfile only. What needs FFmpeg (PyAV, the extra ``serve``) is imported from its own
module: ``formats`` encodes, also while it is spoken, ``tempo`` changes the speed, ``containers`` reads browsers' files.
"""

from csm_core.audio.files import (
    MAX_BYTES,
    MAX_SECONDS,
    WavWriter,
    decode_audio,
    decode_base64_audio,
    encode_wav,
    pcm16_bytes,
    read_audio,
    resample,
    wav_base64,
    write_wav,
)

__all__ = [
    "MAX_BYTES",
    "MAX_SECONDS",
    "WavWriter",
    "decode_audio",
    "decode_base64_audio",
    "encode_wav",
    "pcm16_bytes",
    "read_audio",
    "resample",
    "wav_base64",
    "write_wav",
]
