"""Published names and values against independent implementations: transformers' CSM and Mimi, torchtune's rotation."""

import dataclasses

import pytest
import torch

from csm_core.codec import build_mimi
from csm_core.config import CSM_1B, MIMI, CodecConfig
from csm_core.errors import CheckpointError
from csm_core.model import layouts
from csm_core.model.csm import CSM, rotary_frequencies, rotate
from tests.model import published

FLAVORS = {
    "backbone_flavor": "llama-1B",
    "decoder_flavor": "llama-100M",
    "text_vocab_size": 128256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}


@pytest.mark.parametrize("layout", ["native", "transformers", "original"])
def test_tables_name_every_weight_of_csm_1b(layout):
    with torch.device("meta"):
        expected = {name for name, _ in CSM(CSM_1B).named_parameters()}
    names = layouts.lm_names(layout, CSM_1B)
    assert set(names.values()) == expected
    assert len(names) == {"native": 187, "original": 187, "transformers": 188}[layout]  # one tied copy
    assert layouts.layout_of(names) == layout


def test_layout_of_other_things():
    assert layouts.layout_of(["quantizer.rvq_first.input_proj.weight", "encoder.model.0.conv.conv.weight"]) == "mimi"
    assert layouts.layout_of(["model.embed_tokens.weight"]) is None


def interleaved_rotation(x, angles):
    """torchtune's: neighbours (2i, 2i + 1) are the pairs. ``x`` [T, D], ``angles`` [T, D / 2]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_split_pairs_keeps_attention_scores():
    torch.manual_seed(0)
    head_dim, dim, length = 8, 12, 5
    x = torch.randn(length, dim)
    query, key = torch.randn(2 * head_dim, dim), torch.randn(2 * head_dim, dim)
    angles = torch.arange(length)[:, None] * rotary_frequencies(head_dim, 100.0, None)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    for head in (0, 1):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        expected = interleaved_rotation(x @ query[rows].T, angles) @ interleaved_rotation(x @ key[rows].T, angles).T
        q, k = (
            rotate((x @ layouts.split_pairs(weight, head_dim)[rows].T)[None, None], rotation)[0, 0]
            for weight in (query, key)
        )
        torch.testing.assert_close(q @ k.T, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(layouts.join_pairs(layouts.split_pairs(query, head_dim), head_dim), query)
    assert torch.equal(published.interleave(layouts.split_pairs(query, head_dim), head_dim), query)


@pytest.mark.parametrize("residual_layers", [1, 2])
def test_mimi_of_transformers_is_mimi_of_moshi(residual_layers, tmp_path):
    theirs = published.mimi(num_residual_layers=residual_layers)
    codec = layouts.codec_config({"codec_config": theirs.config.to_dict(), "num_codebooks": 5})
    ours = build_mimi(CodecConfig.from_dict(codec))
    saved = published.saved_state(theirs, tmp_path)
    ours.load_state_dict(layouts.codec_to_native(saved, codec))  # strict: every name, every shape
    # 20 frames: within the window of 40 positions that moshi's attention has and transformers' has not
    pcm = torch.randn(2, 1, 20 * ours.frame_size)
    with torch.no_grad():
        codes = theirs.encode(pcm).audio_codes
        assert min(codes[:, k].unique().numel() for k in range(5)) > 5
        assert torch.equal(ours.encode(pcm), codes)
        heard, expected = ours.decode(codes), theirs.decode(codes).audio_values
    assert expected.std() > 0.01
    torch.testing.assert_close(heard, expected, atol=1e-4, rtol=1e-4)


def test_mimi_without_a_key_projection(tmp_path):
    theirs = published.mimi()
    codec = layouts.codec_config({"codec_config": theirs.config.to_dict()})
    saved = published.saved_state(theirs, tmp_path)
    state = {name: value for name, value in saved.items() if "layers.1.self_attn.k_proj" not in name}
    with pytest.raises(CheckpointError, match=r"coder_transformer.layers.1.self_attn.k_proj.weight"):
        layouts.codec_to_native(state, codec)


def test_mimi_in_older_moshi_names(tiny_codec_state, tiny_codec_config):
    older = {
        name.replace("in_projs.0.weight", "in_proj_weight")
        .replace("out_projs.0", "out_proj")
        .replace("_codebook._initialized", "_codebook.inited")
        .replace("cluster_usage", "cluster_size")
        .replace("embedding_sum", "embed_avg"): value
        for name, value in tiny_codec_state.items()
    }
    assert older.keys() != tiny_codec_state.keys()
    native = layouts.codec_to_native(older, tiny_codec_config.to_dict())
    assert native.keys() == tiny_codec_state.keys()
    assert all(torch.equal(native[name], value) for name, value in tiny_codec_state.items())


def test_config_of_transformers():
    raw = published.csm_config().to_dict()
    config = layouts.model_config(raw)
    assert (config.backbone.layers, config.backbone.dim, config.backbone.ffn_dim) == (3, 64, 96)
    assert (config.depth.heads, config.depth.kv_heads, config.depth.head_dim) == (4, 2, 8)
    assert (config.num_codebooks, config.codebook_size, config.audio_vocab_size) == (4, 64, 67)
    assert (config.text_vocab_size, config.bos_id, config.eos_id, config.max_seq_len) == (60, 1, 2, 128)
    assert config.rope_scaling == CSM_1B.rope_scaling  # 1024, 0.125, 0.5 and 16, 2**-9, 2**-7 are 8192, 1, 4
    codec = CodecConfig.from_dict(layouts.codec_config(raw))
    assert (codec.frame_rate, codec.num_codebooks, codec.total_codebooks) == (50.0, 4, 5)


def test_config_of_transformers_5_and_defaults():
    params = {**published.BACKBONE_ROPE, "rope_theta": 500_000}
    depth = {"rope_parameters": {**published.DEPTH_ROPE, "rope_theta": 500_000}}
    config = layouts.model_config({"model_type": "csm", "rope_parameters": params, "depth_decoder_config": depth})
    assert config == CSM_1B
    assert layouts.codec_config({"model_type": "csm"}) == MIMI.to_dict()


def test_config_of_the_original():
    assert layouts.model_config(FLAVORS) == CSM_1B
    assert layouts.model_config({**FLAVORS, "text_vocab_size": 151936}) == dataclasses.replace(
        CSM_1B, text_vocab_size=151936
    )
    assert layouts.codec_config(FLAVORS) == MIMI.to_dict()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({**FLAVORS, "backbone_flavor": "llama-8B"}, "llama-8B"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rms_norm_eps": 1e-6}, "different rotary or norm"),
        ({"rope_scaling": published.BACKBONE_ROPE}, "different rotary or norm"),
        ({"text_vocab_size": 151936, "bos_token_id": 151643}, "eos_token_id"),
    ],
)
def test_config_that_csm_cannot_be(raw, message):
    with pytest.raises(CheckpointError, match=message):
        layouts.model_config(raw)
