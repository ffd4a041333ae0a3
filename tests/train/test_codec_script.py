import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from csm_core.config import BUNDLED_CODEC
from csm_core.train import codec, encode
from csm_core.train.data import FRAME, Crops, utterances
from tests.train import shards

TINY = dataclasses.replace(
    BUNDLED_CODEC,
    dim=16,
    encoder_filters=2,
    decoder_filters=2,
    transformer_layers=1,
    transformer_heads=2,
    transformer_ffn_dim=32,
    total_codebooks=3,
    num_codebooks=3,
    codebook_size=16,
    codebook_dim=8,
)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    for module in (codec, encode):
        monkeypatch.setattr(module, "BUNDLED_CODEC", TINY)
    shards.write_sentences(tmp_path / "sentences.txt", 60)
    for shard in (0, 1):
        shards.write_audio(tmp_path / "audio", shard, 30)
    return tmp_path


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_crops_are_whole_frames_with_their_own_labels(corpus):
    crops = Crops(sorted((corpus / "audio").glob("*.npz")), frames=3)
    wave, labels = crops.batch(5, draw=0)
    assert wave.shape == (5, 1, 3 * FRAME) and labels.shape == (5, 3, 2)
    cells = wave.view(5, 3, 2, -1)
    assert ((cells.abs().amax(-1) > 0.01) == (labels > 0)).all()  # a tone where a phone is, silence at the pauses
    assert torch.equal(wave, crops.batch(5, draw=0)[0]) and not torch.equal(wave, crops.batch(5, draw=1)[0])


def test_training_resumes_and_encoding_follows(corpus, monkeypatch, capsys):
    command = ["--audio", corpus / "audio", "--out", corpus / "codec.pt", "--batch", 4, "--frames", 4, "--steps"]
    run(codec, monkeypatch, *command, 20)
    first = torch.load(corpus / "codec.pt", weights_only=True)
    run(codec, monkeypatch, *command, 30)
    second = torch.load(corpus / "codec.pt", weights_only=True)
    assert (first["step"], second["step"]) == (20, 30)
    usage = second["mimi"]["quantizer.rvq_rest.vq.layers.1._codebook._initialized"]
    assert usage.item() == 1  # the codebooks were started at 30 % of the steps

    run(
        encode,
        monkeypatch,
        "--audio",
        corpus / "audio",
        "--sentences",
        corpus / "sentences.txt",
        "--codec",
        corpus / "codec.pt",
        "--out",
        corpus / "codes",
    )
    assert "00001.npz: 30 utterances" in capsys.readouterr().out
    with np.load(corpus / "codes" / "00000.npz") as data:
        spoken = list(utterances(corpus / "audio" / "00000.npz"))
        assert data["ends"].tolist() == np.cumsum([len(u.labels) for u in spoken]).tolist()
        assert data["characters"].shape == data["labels"].shape == (data["ends"][-1], 2)
        stored = data["codes"].astype(np.int64)
    mimi = encode.build_mimi(TINY)
    mimi.load_state_dict(load_file(corpus / "codes" / "codec.safetensors"))
    alone = torch.from_numpy(spoken[3].audio.astype(np.float32) / 32768)
    start, end = np.cumsum([len(u.labels) for u in spoken])[2:4]
    assert np.array_equal(mimi.encode(alone.view(1, 1, -1))[0].T.numpy(), stored[start:end])  # batching changed nothing


def test_refining_changes_what_is_heard_and_no_code(corpus, monkeypatch):
    trained, refined = corpus / "codec.pt", corpus / "refined.pt"
    command = ["--audio", corpus / "audio", "--batch", 2, "--frames", 4, "--steps"]
    run(codec, monkeypatch, *command, 6, "--out", trained)
    run(codec, monkeypatch, *command, 3, "--out", refined, "--refine", trained, "--codebooks", 2)
    before, after = (torch.load(file, weights_only=True)["mimi"] for file in (trained, refined))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"upsample", "decoder_transformer", "decoder"}


def test_code_zero_is_retired():
    torch.manual_seed(0)
    mimi = encode.build_mimi(TINY)
    for layer in [*mimi.quantizer.rvq_first.vq.layers, *mimi.quantizer.rvq_rest.vq.layers]:
        layer._codebook.cluster_usage.copy_(torch.arange(16.0, 0.0, -1.0))
        layer._codebook.embedding_sum.normal_()
    before = {k: v.clone() for k, v in mimi.state_dict().items()}
    encode.retire_code_zero(mimi)
    name = "quantizer.rvq_first.vq.layers.0._codebook."
    after = mimi.state_dict()
    assert after[name + "cluster_usage"].tolist() == [1.0, *range(15, 1, -1), 16.0]
    assert torch.equal(after[name + "embedding_sum"][0], before[name + "embedding_sum"][15])
    assert torch.equal(after[name + "embedding_sum"][15], before[name + "embedding_sum"][0])
