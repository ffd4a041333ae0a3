import dataclasses

import torch
from safetensors.torch import save_file

import csm_core
from csm_core.codec import Codec, build_mimi
from csm_core.config import BUNDLED_CODEC
from csm_core.model.csm import CSM
from csm_core.train import export
from csm_core.train.lm import bundled_config


def test_what_is_exported_speaks_and_its_codec_is_the_trained_one(tmp_path, monkeypatch):
    torch.manual_seed(0)
    mimi, refined = build_mimi(BUNDLED_CODEC), build_mimi(BUNDLED_CODEC)
    for name, buffer in mimi.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_()
        if name.endswith("cluster_usage"):
            buffer.uniform_(0.5, 3.0)
    (tmp_path / "codes").mkdir()
    save_file({k: v.contiguous() for k, v in mimi.state_dict().items()}, tmp_path / "codes" / "codec.safetensors")
    torch.save({"mimi": refined.state_dict()}, tmp_path / "refined.pt")
    torch.save({"average": CSM(bundled_config(3)).state_dict(), "step": 7}, tmp_path / "lm.pt")
    arguments = ["--lm", "lm.pt", "--codes", "codes", "--decoder", "refined.pt", "--out", "voice"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["export", *arguments])
    export.main()

    state = {**mimi.state_dict()}
    state |= {k: v for k, v in refined.state_dict().items() if k.split(".")[0] in export.SPEAKING_HALF}
    whole = Codec(BUNDLED_CODEC, state)
    state = export.codec_state(tmp_path / "codes" / "codec.safetensors", 3, tmp_path / "refined.pt")
    kept = Codec(dataclasses.replace(BUNDLED_CODEC, total_codebooks=3, num_codebooks=3), state)
    codes = torch.randint(0, 512, (5, 3))
    mimi_of_three = whole._decoder.quantizer.decode  # decoding fewer codebooks is a prefix of the sum
    torch.testing.assert_close(kept._decoder.quantizer.decode(codes.T[None]), mimi_of_three(codes.T[None]))

    with csm_core.load(str(tmp_path / "voice"), device="cpu") as generator:
        stored = generator.codec.decode(codes)
        torch.testing.assert_close(stored, kept.decode(codes), rtol=0.02, atol=0.02)  # fp16 on disk
        assert generator.codec.num_codebooks == 3 and generator.model_name == "bundled"
