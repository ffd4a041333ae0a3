import dataclasses
import re

import numpy as np
import pytest
import torch

from csm_core.config import StackConfig
from csm_core.model.csm import ABSENT
from csm_core.text import TextTokenizer, character_tokenizer
from csm_core.train import lm
from tests.train import shards

TINY = dataclasses.replace(
    lm.bundled_config(3),
    backbone=StackConfig(layers=3, dim=48, heads=2, kv_heads=2, head_dim=24, ffn_dim=96),
    depth=StackConfig(layers=1, dim=16, heads=2, kv_heads=2, head_dim=8, ffn_dim=32),
)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "bundled_config", lambda num_codebooks: TINY)
    shards.write_sentences(tmp_path / "sentences.txt", 240)
    for shard in (0, 1):
        shards.write_codes(tmp_path / "codes", shard, 120)
    return tmp_path


def load_examples(corpus, config):
    tokenizer = TextTokenizer(character_tokenizer(lm.ALPHABET), config.bos_id, config.eos_id)
    lines = (corpus / "sentences.txt").read_text().splitlines()
    return list(lm.examples(corpus / "codes" / "00000.npz", lines, tokenizer, config.num_codebooks))


def train(corpus, capsys, *arguments):
    """Run the script in the corpus's folder; what it printed."""
    command = [
        "--codes",
        corpus / "codes",
        "--sentences",
        corpus / "sentences.txt",
        "--codebooks",
        3,
        "--tokens",
        250,
        "--threads",
        1,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lm", *map(str, [*command, *arguments])])
        lm.main()
    return capsys.readouterr().out


def test_rows_hold_the_served_layout_and_targets_stand_one_before(corpus):
    config = TINY
    first, second = load_examples(corpus, config)[:2]
    batch = lm.assemble([[first, second], [first]], config, np.random.default_rng(0))
    row = batch.frames[0]
    text = len(first.text)
    assert row[:text, -1].tolist() == first.text and (row[:text, :-1] == ABSENT).all()
    end = text + len(first.codes)
    assert (row[text:end, -1] == ABSENT).all() and (row[text:end, :-1] >= 0).all()
    assert row[end].tolist() == [0, 0, 0, ABSENT]
    assert (batch.frames[1, len(first) :] == ABSENT).all()  # padding
    assert batch.where[0] == text - 1  # the last position of the text predicts the first frame
    assert batch.codes[: len(first.codes)].tolist() == first.codes.tolist()
    assert batch.codes[len(first.codes)].tolist() == [0, 0, 0] and batch.target[len(first.codes)] < 0
    speaks = int(batch.target[3])  # the column of the character that frame 3 speaks
    assert row[speaks, -1] in first.text[lm.TAG :]


def test_the_network_that_is_trained_is_the_one_that_is_served(corpus):
    torch.manual_seed(0)
    config = TINY
    trainee = lm.Trainee(config)
    batch = lm.assemble([[e] for e in load_examples(corpus, config)[:2]], config, np.random.default_rng(0))
    losses = trainee.losses(batch, depth_share=1.0)
    hidden = trainee.csm.forward_backbone(batch.frames).flatten(0, 1)[batch.where]
    first = torch.nn.functional.cross_entropy(trainee.csm.codebook0_logits(hidden), batch.codes[:, 0])
    rest = trainee.csm.depth_logits(hidden, batch.codes).transpose(1, 2)
    torch.testing.assert_close(losses["c0"], first)
    torch.testing.assert_close(losses["depth"], torch.nn.functional.cross_entropy(rest, batch.codes[:, 1:]))
    assert losses["guide"] > 0


def test_it_learns_and_a_resumed_run_equals_an_uninterrupted_one(corpus, capsys):
    straight = train(corpus, capsys, "--steps", 60, "--out", corpus / "a.pt")
    scores = [float(x) for x in re.findall(r"held out: c0 ([\d.]+)", straight)]
    assert scores[-1] < 5.5  # ln 512 = 6.2 before the first step
    train(corpus, capsys, "--steps", 60, "--stop", 25, "--out", corpus / "b.pt")
    train(corpus, capsys, "--steps", 60, "--out", corpus / "b.pt")
    a, b = (torch.load(corpus / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert a["step"] == b["step"] == 60
    for part in ("trainee", "average"):
        for name, weight in a[part].items():
            torch.testing.assert_close(weight, b[part][name], rtol=0, atol=0)
