import random
from pathlib import Path

import pytest

pytest.importorskip("wordfreq")
from csm_core.train import sentences


def write_wordnet(folder: Path, examples: list[str]) -> None:
    for name in ("data.adj", "data.adv", "data.noun", "data.verb"):
        (folder / name).write_text("")
    gloss = "; ".join(f'"{example}"' for example in examples)
    (folder / "data.verb").write_text(f"00001740 29 v 01 breathe 0 021 | draw air; {gloss}\n")


def test_judged_sentences_and_their_likes_stay_out(tmp_path, monkeypatch, capsys):
    judged = sentences.JUDGE_SENTENCES.read_text().splitlines()
    like = "I said " + judged[0].rstrip(".").lower()  # shares more than five words in a row
    write_wordnet(tmp_path, [judged[0], like, "the boy watched the ships far out at sea"])
    out = tmp_path / "out.txt"
    monkeypatch.setattr(
        "sys.argv", ["sentences", "--out", str(out), "--wordnet", str(tmp_path), "--grammar", "200", "--lists", "50"]
    )
    sentences.main()
    lines = out.read_text().splitlines()
    assert "the boy watched the ships far out at sea" in lines
    assert len(lines) == 251
    five = {tuple(w[i : i + 5]) for w in map(sentences.words_of, judged) for i in range(len(w) - 4)}
    for words in map(sentences.words_of, lines):
        assert not any(tuple(words[i : i + 5]) in five for i in range(len(words) - 4))


def test_same_seed_same_sentences():
    first = [sentences.grammar_sentence(random.Random(7)) for _ in range(3)]
    assert first == [sentences.grammar_sentence(random.Random(7)) for _ in range(3)]
    many = {sentences.grammar_sentence(random.Random(seed)) for seed in range(500)}
    assert len(many) > 480
    assert all(line[0].isupper() and line[-1] in ".?" and "_" not in line for line in many)
