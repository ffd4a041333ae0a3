import numpy as np
import pytest

pytest.importorskip("pyworld")
from csm_core.train import teacher


def test_cells_follow_the_phones_and_fill_frames():
    phones = ["pau", "dh", "ax", "t", "pau"]
    ends = np.array([0.18, 0.33, 0.335, 0.52, 0.70])
    cells = teacher.cells_of(phones, ends)
    assert cells[0] == 2  # the first pause is one frame, however long it was
    assert (cells >= 1).all() and cells.sum() % 2 == 0
    assert cells[1:4].sum() == round((0.52 - 0.18) / teacher.CELL)


def test_a_phone_shorter_than_a_cell_borrows_from_its_successor():
    cells = teacher.cells_of(["pau", "t", "r", "iy", "pau"], np.array([0.1, 0.11, 0.12, 0.30, 0.4]))
    assert list(cells[1:4]) == [1, 1, 3]


def test_pitch_is_locked_to_the_frame():
    rate = 16_000
    time = np.arange(rate) / rate
    voice = 0.3 * np.sign(np.sin(2 * np.pi * 117.0 * time)) * np.exp(-((time - 0.5) ** 2))  # another pitch
    spoken = teacher.locked(voice, rate, np.array([1.0]), np.array([24]), speaker=0)
    assert len(spoken) == 12 * 1920
    middle = spoken[4 * 1920 : 8 * 1920].reshape(4, 1920)
    # Whole periods in a frame: neighbouring frames of a steady sound are alike, sample by sample.
    correlation = np.corrcoef(middle)
    assert correlation[0, 1] > 0.95 and correlation[1, 2] > 0.95
    assert np.corrcoef(np.stack([middle[0], np.roll(middle[1], 60)]))[0, 1] < 0.8  # and it could fail


def test_formants_move_and_the_level_stays():
    peak = np.exp(-(((np.arange(513) - 200) / 10.0) ** 2))
    moved = teacher.stretched(np.stack([peak, peak]), 1.12)
    assert moved.shape == (2, 513) and list(moved.argmax(axis=1)) == [224, 224]
    assert moved.max() > 0.99
    assert np.array_equal(teacher.stretched(peak[None], 1.0)[0], peak)
