"""The loudspeaker, through sounddevice. Importing this needs sounddevice and the system's PortAudio library.

Knows PCM only: not where it comes from.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import sounddevice
from torch import Tensor

from csm_core.errors import CsmError


class Player:
    """Plays chunks of mono PCM on a thread of its own: what is being heard does not hold up what is being made."""

    def __init__(self) -> None:
        self._chunks: SimpleQueue[Tensor | None] = SimpleQueue()

    def hear(self, chunk: Tensor) -> None:
        """Queue PCM float32 ``[samples]``; returns at once."""
        self._chunks.put(chunk)

    @contextmanager
    def playing(self, sample_rate: int) -> Iterator[None]:
        """Play while the block runs; its end waits for the last sound. Raises CsmError without an output device."""
        try:
            device = sounddevice.OutputStream(samplerate=sample_rate, channels=1, dtype="float32")
        except sounddevice.PortAudioError as error:
            raise CsmError(f"There is no loudspeaker to play on ({error}); without --play it is saved.") from error
        with device:
            thread = threading.Thread(target=self._play, args=(device,), name="csm-player", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._chunks.put(None)
                thread.join()

    def _play(self, device: sounddevice.OutputStream) -> None:
        while (chunk := self._chunks.get()) is not None:
            device.write(chunk.numpy().reshape(-1, 1))
