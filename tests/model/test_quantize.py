"""Packed weights: every mode says nearly the same as fp32, row by row, and leaves alone what it should."""

import weakref

import pytest
import torch
from torch import nn

from csm_core.config import ModelConfig, Quantization, StackConfig
from csm_core.errors import InvalidInputError
from csm_core.model import quantize as quantize_module
from csm_core.model.csm import ABSENT, CSM
from csm_core.model.quantize import Fp8Linear, Int8Linear, WeightOnlyInt8Linear, layers_for, quantize

WIDE = StackConfig(layers=2, dim=128, heads=4, kv_heads=2, head_dim=32, ffn_dim=256)
CONFIG = ModelConfig(
    backbone=WIDE,
    depth=WIDE,
    num_codebooks=4,
    codebook_size=61,
    audio_vocab_size=67,  # no multiple of anything, as CSM-1B's 2051
    text_vocab_size=64,
    max_seq_len=64,
    bos_id=0,
    eos_id=1,
)
CPU = layers_for(torch.device("cpu"))
# Relative error of a product with random numbers: what rounding to that many bits must cost, and twice that at most.
ERRORS = {"int8": (0.004, 0.015), "int4": (0.04, 0.13), "fp16": (0.00005, 0.0005), "bf16": (0.001, 0.005)}
MODES = [pytest.param(mode, marks=pytest.mark.skipif(mode not in CPU, reason="not on this CPU")) for mode in ERRORS]


@pytest.fixture
def fresh():
    """A model whose weights bf16 can say, anew for each test: quantising is in place."""
    torch.manual_seed(0)
    model = CSM(CONFIG)
    model.init_weights(std=0.1)
    return model.bfloat16().float().eval().requires_grad_(False)


def relative(out, exact):
    return ((out.float() - exact).norm() / exact.norm()).item()


def teacher_forced(model):
    """Logits of every codebook [frames, K, V] for given frames, through the path that speech takes."""
    frames = torch.randint(0, CONFIG.codebook_size, (1, 24, 5), generator=torch.Generator().manual_seed(1))
    frames[:, :, -1] = ABSENT
    logits = []

    def pick(scores, codebook):
        logits.append(scores.float())
        return frames[0, 1:, codebook]

    model.decode_frame(model.forward_backbone(frames)[0, :-1], pick)
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_rounds_as_much_as_its_bits_say(mode):
    layer, dtype = CPU[mode]
    torch.manual_seed(0)
    weight = torch.randn(67, 256) * torch.rand(67, 1)  # the scale is each output's own
    x = torch.randn(2, 3, 256) * torch.tensor([1.0, 100.0, 0.01]).view(3, 1)  # and each row's
    out = layer(weight)(x.to(dtype))
    assert out.dtype == dtype
    assert out.shape == (2, 3, 67)
    least, most = ERRORS[mode]
    for row, exact in zip(out.view(6, 67), (x @ weight.T).view(6, 67), strict=True):
        assert least < relative(row, exact) < most


@pytest.mark.parametrize("mode", MODES)
def test_a_row_does_not_depend_on_its_neighbours(mode):
    layer, dtype = CPU[mode]
    torch.manual_seed(0)
    linear = layer(torch.randn(64, 128))
    x = torch.randn(8, 128).to(dtype)
    others = x.clone()
    others[1:] = 1000 * torch.randn(7, 128)
    others[3] = float("nan")
    assert torch.equal(linear(others)[0], linear(x)[0])
    if mode == "int8":  # sums of integers: not even the number of rows matters
        assert torch.equal(linear(x)[2:3], linear(x[2:3]))


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros_and_what_is_broken_stays_broken(mode):
    layer, dtype = CPU[mode]
    x = torch.zeros(3, 128, dtype=dtype)
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    out = layer(torch.randn(64, 128))(x)
    assert not out[0].any()
    assert not out[1:].isfinite().any()


@pytest.mark.skipif("int8" not in CPU or CPU["int8"][0] is not Int8Linear, reason="no FBGEMM here")
def test_the_largest_products_do_not_overflow():
    out = Int8Linear(torch.ones(32, 2048))(torch.ones(2, 2048))
    assert torch.allclose(out, torch.tensor(2048.0), rtol=1e-5)
    assert torch.allclose(Int8Linear(-torch.ones(32, 2048))(torch.ones(2, 2048)), torch.tensor(-2048.0), rtol=1e-5)


@pytest.mark.skipif("int8" not in CPU or CPU["int8"][0] is not Int8Linear, reason="no FBGEMM here")
def test_seven_bit_activations_for_processors_that_would_overflow(monkeypatch):
    monkeypatch.setattr(quantize_module, "activation_levels", lambda: 63)
    torch.manual_seed(0)
    weight, x = torch.randn(67, 256), torch.randn(3, 256)
    assert 0.008 < relative(Int8Linear(weight)(x), x @ weight.T) < 0.02
    assert torch.allclose(Int8Linear(torch.ones(32, 2048))(torch.ones(2, 2048)), torch.tensor(2048.0), rtol=1e-5)


def test_weight_only_int8():
    torch.manual_seed(0)
    weight, x = torch.randn(67, 256), torch.randn(2, 3, 256).bfloat16()
    out = WeightOnlyInt8Linear(weight.bfloat16())(x)
    assert out.shape == (2, 3, 67)
    assert relative(out, x.float() @ weight.T) < 0.015


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_model_says_nearly_the_same(mode, fresh):
    exact = teacher_forced(fresh)
    packed = quantize(fresh, Quantization(mode))
    assert packed is fresh
    logits = teacher_forced(packed)
    assert relative(logits, exact) < 12 * ERRORS[mode][1]
    agree = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
    assert agree > {"int8": 0.9, "int4": 0.4, "fp16": 0.98, "bf16": 0.95}[mode]
    dtype = CPU[mode][1]
    assert {weight.dtype for weight in packed.parameters()} == {dtype}  # one dtype: cache and activations follow it
    assert not [module for module in packed.modules() if isinstance(module, nn.Linear)]
    left = {name for name, _ in packed.named_parameters() if "norm" not in name}
    assert left == {"text_embedding.weight", "audio_embedding.weight"}


@pytest.mark.parametrize("mode", MODES)
def test_depth_only_leaves_the_backbone_alone(mode, fresh):
    dtype = CPU[mode][1]
    frames = torch.ones(1, 4, 5, dtype=torch.int64)
    plain = fresh.to(dtype)
    hidden = plain.forward_backbone(frames)
    first = plain.codebook0_logits(hidden)
    packed = quantize(plain, Quantization(mode, "depth"))
    assert torch.equal(packed.forward_backbone(frames), hidden)
    assert torch.equal(packed.codebook0_logits(hidden), first)
    assert not [module for module in packed.depth.modules() if isinstance(module, nn.Linear)]
    assert not isinstance(packed.projection, nn.Linear)
    assert isinstance(packed.audio_head, nn.ModuleList)


def test_a_layers_weight_is_freed_before_the_next_is_packed(fresh, monkeypatch):
    """The peak is the model and one layer: a 1B model is quantised where it just fits."""
    weights = [weakref.ref(module.weight) for module in fresh.modules() if isinstance(module, nn.Linear)]
    alive = []

    class Counting(nn.Module):
        def __init__(self, weight):
            super().__init__()
            alive.append(sum(ref() is not None for ref in weights))

    monkeypatch.setattr(quantize_module, "layer_for", lambda *_: (Counting, torch.float32))
    quantize(fresh, Quantization("int8"))
    linears, heads = len(weights), CONFIG.num_codebooks - 1
    assert alive == [*range(linears, 0, -1), *[0] * heads]


def test_what_the_device_cannot_is_said(fresh):
    with pytest.raises(InvalidInputError, match=r"no fp8 on cpu here; modes: int8, int4"):
        quantize(fresh, Quantization("fp8"))


def test_int4_says_which_widths_it_needs(tiny_model_config):
    with pytest.raises(InvalidInputError, match=r"multiple of 32, not 16"):
        quantize(CSM(tiny_model_config), Quantization("int4"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8", "int4", "fp8"])
def test_on_cuda_the_whole_model_says_nearly_the_same(mode, fresh):
    place = torch.device("cuda")
    if mode not in layers_for(place):
        pytest.skip(f"no {mode} on this GPU")
    frames = torch.randint(0, 61, (8, 4, 5), device=place)
    picked = []

    def pick(logits, codebook):
        picked.append(logits.float())
        return frames[: len(logits), 0, codebook]

    exact = fresh.to(place)
    hidden = exact.forward_backbone(frames)[:, -1]
    exact.decode_frame(hidden, pick)
    packed = quantize(exact.bfloat16(), Quantization(mode))
    for rows in (1, 3, 8):  # any batch bucket
        wanted = [logits[:rows] for logits in picked[:4]]
        packed.decode_frame(packed.forward_backbone(frames[:rows])[:, -1], pick)
        assert relative(torch.stack(picked[-4:]), torch.stack(wanted)) < {"int8": 0.2, "int4": 1.2, "fp8": 0.6}[mode]


@pytest.mark.gpu
def test_fp8_on_cuda_rounds_as_much_as_its_bits_say():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("from Hopper on")
    torch.manual_seed(0)
    weight, x = torch.randn(67, 256, device="cuda"), torch.randn(2, 3, 256, device="cuda").bfloat16()
    out = Fp8Linear(weight)(x)
    assert 0.01 < relative(out, x.float() @ weight.T) < 0.06
