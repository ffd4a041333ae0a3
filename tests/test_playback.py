"""The player against a stand-in for the loudspeaker: no machine that runs tests has one."""

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from csm_core.errors import CsmError

LOUDSPEAKER = """
played, opened = [], []

class PortAudioError(Exception):
    pass

class OutputStream:
    def __init__(self, samplerate, channels, dtype):
        if samplerate == 0:
            raise PortAudioError("no device")
        opened.append((samplerate, channels, dtype))
    def __enter__(self):
        return self
    def __exit__(self, *error):
        opened.append("closed")
    def write(self, samples):
        assert samples.ndim == 2 and samples.shape[1] == 1 and "closed" not in opened
        played.extend(samples[:, 0].tolist())
"""


@pytest.fixture
def sounddevice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "sounddevice.py").write_text(LOUDSPEAKER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("sounddevice", "csm_core.playback"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("sounddevice")
    for name in ("sounddevice", "csm_core.playback"):
        sys.modules.pop(name, None)


def test_everything_is_played_in_order_before_the_block_ends(sounddevice: ModuleType) -> None:
    player = importlib.import_module("csm_core.playback").Player()
    with player.playing(24_000):
        player.hear(torch.tensor([0.25, 0.5]))
        player.hear(torch.tensor([0.75]))
    assert sounddevice.played == [0.25, 0.5, 0.75]
    assert sounddevice.opened == [(24_000, 1, "float32"), "closed"]
    assert not [thread for thread in threading.enumerate() if thread.name == "csm-player"]


def test_an_error_inside_still_closes(sounddevice: ModuleType) -> None:
    player = importlib.import_module("csm_core.playback").Player()
    with pytest.raises(KeyError), player.playing(24_000):
        raise KeyError
    assert sounddevice.opened[-1] == "closed"


def test_no_loudspeaker_is_a_sentence(sounddevice: ModuleType) -> None:
    player = importlib.import_module("csm_core.playback").Player()
    with pytest.raises(CsmError, match="no loudspeaker"), player.playing(0):
        pass
