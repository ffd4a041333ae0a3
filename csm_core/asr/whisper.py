"""Whisper through faster-whisper (the extra ``whisper``): a hundred languages, punctuation, times. The model is
downloaded from the Hub when first used, unless it is a folder.
"""

from threading import Lock

import torch
from faster_whisper import WhisperModel

from csm_core.asr.transcript import Passage, Transcript, check_language
from csm_core.audio import resample

DEFAULT_MODEL = "base"  # 145 MB, real time on one CPU core
RATE = 16_000


class WhisperTranscriber:
    """One model; callers on several threads take turns."""

    def __init__(self, model: str = DEFAULT_MODEL, device: str | None = None) -> None:
        """``model``: a size ("tiny", "base", "small", "large-v3", ...), a repository or a folder in CTranslate2's
        layout. ``device``: "cpu", "cuda" or None for what there is.
        """
        self._name = model
        self._device = device or "auto"
        self._lock = Lock()
        self._model: WhisperModel | None = None

    def transcribe(self, pcm: torch.Tensor, sample_rate: int, language: str | None = None) -> Transcript:
        """See Transcriber."""
        wave = resample(pcm.detach().to("cpu", torch.float32), sample_rate, RATE).numpy()
        with self._lock:
            if self._model is None:
                self._model = WhisperModel(self._name, device=self._device, compute_type="default")
            code = check_language(language, self._model.supported_languages, f"Whisper {self._name}")
            # Without speech Whisper invents some: its voice detector drops silence first.
            parts, info = self._model.transcribe(wave, language=code, vad_filter=True, condition_on_previous_text=False)
            segments = tuple(Passage(part.start, part.end, part.text.strip()) for part in parts)
        text = " ".join(segment.text for segment in segments)
        return Transcript(text, info.language, len(pcm) / sample_rate, segments)
