"""The memory plan against what is really allocated, and what a refusal offers instead."""

import dataclasses

import pytest
import torch
from torch import nn

from csm_core.codec import build_mimi
from csm_core.config import BUNDLED_CODEC, CSM_1B, MIMI, EngineConfig, Quantization, StackConfig
from csm_core.engine.memory import (
    Precision,
    Shapes,
    check_fits,
    codec_state_bytes,
    largest_slots,
    plan,
    slot_bytes,
    weight_bytes,
)
from csm_core.errors import CsmError, InsufficientMemoryError
from csm_core.model.csm import CSM
from csm_core.model.kv_cache import KVCache
from csm_core.model.quantize import layers_for, quantize

FULL = Shapes(CSM_1B, MIMI, 385_000_000)
HALF = Precision(2)
CPU = torch.device("cpu")


def test_weights_are_counted_to_the_last_one(tiny_model_config):
    config = dataclasses.replace(tiny_model_config, num_codebooks=5, backbone=StackConfig(3, 24, 4, 2, 6, 40))
    count = sum(weight.numel() for weight in CSM(config).parameters())
    assert weight_bytes(config, Precision(1)) == count
    assert weight_bytes(config, Precision(4)) == 4 * count


def test_what_each_mode_makes_of_csm_1b():
    """CSM-1B has 1.55 G weights, of which 0.4 G are embeddings; bytes of a whole model in each mode, in GB."""
    sizes = {
        "off": weight_bytes(CSM_1B, HALF),
        **{
            text: weight_bytes(CSM_1B, Precision(2, Quantization.parse(text)))
            for text in ("int8", "int4", "fp8", "bf16", "int8:depth")
        },
    }
    assert {text: round(size / 1e9, 2) for text, size in sizes.items()} == {
        "off": 3.11,
        "int8": 1.96,
        "int4": 1.52,
        "fp8": 1.96,
        "bf16": 3.11,
        "int8:depth": 2.93,
    }


@pytest.mark.parametrize("part", ["all", "depth"])
def test_what_is_not_packed_is_counted_exactly(part, tiny_model_config):
    """The parameters that are left after quantising are those that the plan counts as not packed."""
    dtype = layers_for(CPU)["int8"][1]
    stack = dataclasses.replace(tiny_model_config.backbone, dim=64, ffn_dim=96)
    config = dataclasses.replace(tiny_model_config, backbone=stack, depth=stack)
    model = quantize(CSM(config), Quantization("int8", part))
    left = sum(weight.numel() for weight in model.parameters())
    packed = weight_bytes(config, Precision(1)) - left
    assert packed > 0
    planned = weight_bytes(config, Precision(dtype.itemsize, Quantization("int8", part)))
    assert planned == left * dtype.itemsize + int(packed * 1.01)


@pytest.mark.parametrize("number", [2, 4])
def test_a_slot_holds_its_cache_and_more(number):
    dtype = {2: torch.bfloat16, 4: torch.float32}[number]
    cache = KVCache(CSM_1B.backbone, 1, CSM_1B.max_seq_len, dtype, "meta")
    at_least = (cache.keys.numel() + cache.values.numel()) * number + codec_state_bytes(MIMI)
    size = slot_bytes(FULL, EngineConfig(), Precision(number))
    assert at_least < size < at_least + 30e6  # the rest is work: noise, the widest tensors of a chunk of sound


@pytest.mark.parametrize("config", [BUNDLED_CODEC, dataclasses.replace(BUNDLED_CODEC, ratios=(4, 4, 2), dim=96)])
def test_codec_state_is_what_moshi_keeps(config):
    """The edges of every convolution of moshi's own decoder, and the context of its attention."""
    mimi = build_mimi(config)
    parts = (mimi.upsample, mimi.decoder_transformer, mimi.decoder)
    edges = sum(_edge_numbers(module) for part in parts for module in part.modules())
    attention = config.transformer_layers * 2 * config.transformer_context * config.dim
    assert codec_state_bytes(config, piece=0) == 4 * (edges + attention)


def test_a_real_stream_keeps_no_more(tiny_codec, tiny_codec_config):
    state = sum(tensor.nbytes for tensor in tiny_codec.stream(3)._decoder.state)
    assert 0.7 < state / (3 * codec_state_bytes(tiny_codec_config)) <= 1


def _edge_numbers(module):
    """What a convolution remembers: the past of its kernel, or the overlap of its upsampling."""
    if isinstance(module, nn.Conv1d):
        return module.in_channels * (module.dilation[0] * (module.kernel_size[0] - 1) + 1 - module.stride[0])
    if isinstance(module, nn.ConvTranspose1d):
        return module.out_channels * (module.kernel_size[0] - module.stride[0])
    return 0


def test_everything_grows_with_what_it_should():
    small = plan(FULL, EngineConfig(slots=1), HALF)
    more = plan(FULL, EngineConfig(slots=9), HALF)
    assert more.slots - small.slots == 8 * slot_bytes(FULL, EngineConfig(), HALF)
    assert (more.weights, more.codec, more.prefixes) == (small.weights, small.codec, small.prefixes)
    without = plan(FULL, EngineConfig(slots=1, prefix_cache_bytes=0), HALF)
    assert small.total - without.total == EngineConfig().prefix_cache_bytes


def test_quantising_starts_from_bf16():
    planned = plan(FULL, EngineConfig(prefix_cache_bytes=0), Precision(2, Quantization("int4")))
    assert planned.total == planned.loading == weight_bytes(CSM_1B, HALF) + FULL.codec_bytes
    assert planned.weights + planned.codec + planned.slots < planned.loading


@pytest.mark.parametrize("precision", [HALF, Precision(4), Precision(4, Quantization("int8", "depth"))])
def test_the_largest_number_of_slots_fits_and_one_more_does_not(precision):
    for available in (8e9, 24e9, 80e9):
        slots = largest_slots(FULL, EngineConfig(), precision, int(available))
        assert plan(FULL, EngineConfig(slots=slots), precision).total <= available if slots else True
        assert plan(FULL, EngineConfig(slots=slots + 1), precision).total > available


def test_what_fits_is_accepted_and_what_cannot_be_known_too():
    engine = EngineConfig(slots=4)
    assert check_fits(FULL, engine, [HALF], int(10e9)) == plan(FULL, engine, HALF)
    assert check_fits(FULL, engine, [HALF], None) == plan(FULL, engine, HALF)
    exactly = plan(FULL, engine, HALF).total
    assert check_fits(FULL, engine, [HALF], exactly).total == exactly
    with pytest.raises(InsufficientMemoryError):
        check_fits(FULL, engine, [HALF], exactly - 1)


def test_a_refusal_says_what_would_fit():
    with pytest.raises(CsmError, match=r"with 400 slots, and 24\.00 GB are free: \d+ slots would fit\.$") as refusal:
        check_fits(FULL, EngineConfig(slots=400), [HALF], int(24e9))
    offered = int(str(refusal.value).split(": ")[-1].split()[0])
    assert offered == largest_slots(FULL, EngineConfig(), HALF, int(24e9)) > 100
    eights = Precision(4, Quantization("int8"))
    with pytest.raises(InsufficientMemoryError, match=r": 1 slots would fit with CSM_QUANTIZE=int8\.$"):
        check_fits(FULL, EngineConfig(), [Precision(4), eights], int(3.9e9))
    with pytest.raises(InsufficientMemoryError, match="no number of slots and no quantisation of this model fits"):
        check_fits(FULL, EngineConfig(), [Precision(4), eights], int(1e9))
