"""Somebody else's transcriber: any endpoint with OpenAI's ``/audio/transcriptions`` (the extra ``asr``)."""

import math
from typing import Any
from urllib.parse import urlsplit

import requests
import torch

from csm_core.asr.pauses import split_at_pauses
from csm_core.asr.transcript import Passage, Transcript
from csm_core.audio import encode_wav, resample
from csm_core.errors import TranscriptionError, UnsupportedLanguageError

DEFAULT_MODEL = "whisper-1"
RATE = 16_000  # of speech recognisers; a third less to send than the model's own
PIECE_SECONDS = 600.0  # 19 MB of WAV: such endpoints take 25
CONNECT_SECONDS = 5.0
LANGUAGE_WORDS = ("language", "iso-639")  # in a refusal that is about the language


class RemoteTranscriber:
    """Sends WAV, asks for ``verbose_json``, is content with plain ``json``. Threads share nothing."""

    def __init__(
        self, base_url: str, model: str = DEFAULT_MODEL, api_key: str | None = None, timeout: float = 120.0
    ) -> None:
        """``base_url`` ends before ``/audio``, as for OpenAI's own clients. ``timeout``: seconds until it answers.

        Raises ValueError for another kind of address.
        """
        address = urlsplit(base_url)
        if address.scheme not in {"http", "https"} or not address.hostname:
            raise ValueError(
                f"The address of a transcription endpoint begins with http:// or https://, not {base_url!r}."
            )
        self._url = base_url.rstrip("/") + "/audio/transcriptions"
        self._host = address.hostname
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout

    def transcribe(self, pcm: torch.Tensor, sample_rate: int, language: str | None = None) -> Transcript:
        """See Transcriber; which languages there are is for the endpoint to say."""
        wave = resample(pcm.detach().to("cpu", torch.float32), sample_rate, RATE)
        texts: list[str] = []
        segments: list[Passage] = []
        spoken = language or ""
        for start, stop in split_at_pauses(wave, RATE, PIECE_SECONDS):
            answer = self._ask(encode_wav(wave[start:stop], RATE), language)
            shift, seconds = start / RATE, (stop - start) / RATE
            text = str(answer.get("text") or "").strip()
            texts.append(text)
            segments += _passages(answer.get("segments"), shift) or (
                [Passage(shift, shift + seconds, text)] if text else []
            )
            spoken = spoken or str(answer.get("language") or "")
        return Transcript(" ".join(filter(None, texts)), spoken, len(pcm) / sample_rate, tuple(segments))

    def _ask(self, wav: bytes, language: str | None) -> dict[str, Any]:
        fields = {"model": self._model, "response_format": "verbose_json"} | (
            {"language": language} if language else {}
        )
        try:
            reply = requests.post(
                self._url,
                data=fields,
                files={"file": ("speech.wav", wav, "audio/wav")},
                headers=self._headers,
                timeout=(CONNECT_SECONDS, self._timeout),
                allow_redirects=False,  # the key goes to the address that was written down and to no other
            )
        except requests.RequestException as error:
            kind = "did not answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
            raise TranscriptionError(f"The transcription endpoint {self._host} {kind}.") from error
        if reply.status_code != requests.codes.ok:
            if reply.status_code in {400, 422} and language and any(w in reply.text.lower() for w in LANGUAGE_WORDS):
                raise UnsupportedLanguageError(
                    f"The transcription endpoint does not know the language {language[:40]!r}."
                )
            raise TranscriptionError(f"The transcription endpoint {self._host} answered {reply.status_code}.")
        try:
            answer = reply.json()
        except requests.JSONDecodeError as error:
            raise TranscriptionError(
                f"The transcription endpoint {self._host} answered something else than JSON."
            ) from error
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise TranscriptionError(f"The transcription endpoint {self._host} answered JSON without a text.")
        return answer


def _passages(values: object, shift: float) -> list[Passage]:
    """The segments of a ``verbose_json`` answer, ``shift`` seconds later; what is not of their form is left out."""
    found = []
    for value in values if isinstance(values, list) else []:
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            start, end = value.get("start"), value.get("end")
            if isinstance(start, int | float) and isinstance(end, int | float) and math.isfinite(start + end):
                found.append(Passage(start + shift, end + shift, value["text"].strip()))
    return found
