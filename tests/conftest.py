"""Tiny real things: a CSM 16 wide, a Mimi with two codebooks, and a generator of both. Fixed seeds, no downloads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from csm_core.codec import Codec, build_mimi
from csm_core.config import CodecConfig, ModelConfig, Profile, StackConfig
from csm_core.generator import Generator
from csm_core.model.checkpoint import Description, save_native
from csm_core.model.csm import CSM
from csm_core.text import TextTokenizer, character_tokenizer

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789[]'.,?!"

TINY_STACK = StackConfig(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=32)

TINY_MODEL = ModelConfig(
    backbone=TINY_STACK,
    depth=TINY_STACK,
    num_codebooks=2,
    codebook_size=61,
    audio_vocab_size=64,
    text_vocab_size=64,
    max_seq_len=512,
    bos_id=0,
    eos_id=1,
    rope_scaling=None,
)

# The context of 12 positions is 6 frames: a stream passes it at once, where a cache without room would go wrong.
TINY_CODEC = CodecConfig(
    dim=16,
    encoder_filters=2,
    decoder_filters=2,
    transformer_layers=1,
    transformer_heads=2,
    transformer_ffn_dim=32,
    transformer_context=12,
    layer_scale=0.5,
    channel_wise_upsample=False,
    total_codebooks=2,
    num_codebooks=2,
    codebook_size=61,
    codebook_dim=8,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_config() -> ModelConfig:
    return TINY_MODEL


@pytest.fixture(scope="session")
def tiny_codec_config() -> CodecConfig:
    return TINY_CODEC


@pytest.fixture(scope="session")
def tiny_model() -> CSM:
    torch.manual_seed(0)
    model = CSM(TINY_MODEL)
    model.init_weights(std=0.5)  # far from uniform: an attention or a position that goes wrong shows in the codes
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_codec_state() -> dict[str, torch.Tensor]:
    """Random weights, about as loud as speech. (moshi's fresh codebooks are all zero: one sound for all codes.)"""
    torch.manual_seed(0)
    mimi = build_mimi(TINY_CODEC).requires_grad_(False)
    for name, value in mimi.state_dict().items():
        if name.endswith("embedding_sum"):
            value.normal_(std=4.0)
    for module in [*mimi.decoder.modules(), *mimi.upsample.modules()]:
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            fan_in = module.in_channels * module.kernel_size[0]
            if isinstance(module, torch.nn.ConvTranspose1d):
                fan_in = module.in_channels * module.kernel_size[0] // module.stride[0]
            torch.nn.init.normal_(module.weight, std=fan_in**-0.5)
    mimi.decoder.model[-1].conv.conv.weight.mul_(0.1)
    return {name: value.detach().clone() for name, value in mimi.state_dict().items()}


@pytest.fixture(scope="session")
def tiny_codec(tiny_codec_state: dict[str, torch.Tensor]) -> Codec:
    return Codec(TINY_CODEC, tiny_codec_state)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: CSM, tiny_codec_state: dict[str, torch.Tensor]
) -> Path:
    """The tiny model and codec as a native checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer_file = folder / "characters.json"
    character_tokenizer(ALPHABET).save(str(tokenizer_file))
    defaults = {"temperature": 0.8, "top_k": 20, "max_chars": 60, "spell_out": True, "speakers": [0, 1]}
    description = Description("tiny", TINY_CODEC.to_dict(), defaults, tokenizer_file)
    return save_native(folder / "native", tiny_model, tiny_codec_state, description, dtype=torch.float32)


@pytest.fixture
def tiny_generator(tiny_model: CSM, tiny_codec: Codec) -> Iterator[Generator]:
    """Speaks noise, of the right length and in milliseconds. Sentences of up to 60 characters, speakers 0 and 1."""
    tokenizer = TextTokenizer(character_tokenizer(ALPHABET), TINY_MODEL.bos_id, TINY_MODEL.eos_id)
    profile = Profile("tiny", temperature=0.8, top_k=20, max_chars=60, spell_out=True, speakers=(0, 1))
    with Generator(tiny_model, tiny_codec, tokenizer, profile) as generator:
        yield generator
