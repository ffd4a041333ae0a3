import numpy as np

from csm_core.train.align import CHARACTERS, best_path, character_indices, characters_of_cells, learn, runs
from csm_core.train.data import PHONES

SAY = {"b": ["b"], "a": ["ae"], "t": ["t"], "s": ["s"], "o": ["aa"], "x": ["k", "s"], "m": ["m"], "e": ["eh"], " ": []}


def pronounce(text: str) -> np.ndarray:
    return np.array([PHONES.index(p) for p in ["pau", *(p for c in text for p in SAY[c]), "pau"]])


def test_best_path_is_the_cheapest_monotone_one():
    cost = np.array([[0.0, 9.0, 9.0], [9.0, 0.0, 0.0], [9.0, 9.0, 0.0]])
    assert best_path(cost) == [(0, 0), (1, 1), (2, 2)]
    assert best_path(np.zeros((1, 3))) == [(0, 0), (0, 1), (0, 2)]


def test_letters_find_their_phones_without_a_dictionary():
    words = ["bat", "tab", "sat", "box", "mat", "tom", "bet", "set", "toast", "exam", "boat", "base", "mast", "stem"]
    texts = [f"{a} {b}" for a in words for b in words]
    table = learn([character_indices(t) for t in texts], [pronounce(t) for t in texts])
    for letter, phone in [("b", "b"), ("t", "t"), ("m", "m"), ("o", "aa")]:
        assert table[CHARACTERS.index(letter)].argmin() == PHONES.index(phone)
    text = "bat exam"
    labels = np.repeat(pronounce(text), 2)
    where = characters_of_cells(table, character_indices(text), labels)
    assert len(where) == len(labels) and (np.diff(where) >= 0).all()
    m = np.flatnonzero(labels == PHONES.index("m"))
    assert (where[m] == text.index("m")).all()


def test_runs_number_the_phones():
    phones, of_cell = runs(np.array([0, 0, 5, 5, 5, 0]))
    assert phones.tolist() == [0, 5, 0] and of_cell.tolist() == [0, 0, 1, 1, 1, 2]
