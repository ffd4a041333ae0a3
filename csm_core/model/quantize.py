"""Fewer bytes per weight: the linear layers and heads of a loaded CSM in packed int8, int4, fp8 or 16 bit.

Each layer has the rounding, the layout and the kernel of its mode behind ``forward(x)``; the kernels are PyTorch's own.
Embeddings and norms keep their numbers: a step reads a few rows of them. A packed weight is no parameter: it is not
trained, saved or moved. Whether a voice survives a mode is judged elsewhere (train/judge_quantized.py).
Shapes: N outputs, K inputs, M rows; ``x`` [..., K] -> [..., N].
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm_core.config import Profile, Quantization
from csm_core.errors import InvalidInputError
from csm_core.model.csm import CSM

DEFAULT_ON_CPU = "fp16"
INT4_GROUP = 32  # weights that share a scale and a zero
FP8_MAX = 448.0  # of float8_e4m3fn
TINY = 1e-30  # instead of the scale of a row of zeros


class Int8Linear(nn.Module):
    """8-bit weights, a scale per output, times 8-bit activations, a scale per row; FBGEMM's kernel, fp32 in and out.

    The activations are rounded because that is what makes it fast: weight-only kernels convert every weight before they
    multiply and are slower by a factor of 2.6 (docs/log.md). FBGEMM's own dynamic mode takes one scale
    for all rows, so that a caller's codes would depend on the others; here a row is divided by its largest entry first
    and every row has the same fixed scale. The sums are integers: a row is the same bits in any batch.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.float()
        scale = weight.abs().amax(dim=1).clamp_min(TINY) / 127
        rounded = torch.quantize_per_channel(weight, scale, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.levels = activation_levels()

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_min_(TINY)
        return _int8_matmul(x / largest, self.packed, self.levels).mul_(largest)


def _int8_matmul(x: Tensor, packed: object, levels: int) -> Tensor:
    """``x`` in -1 .. 1, rounded to ``levels`` steps on each side of zero, times a packed weight -> fp32."""
    out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1 / levels, levels + 1, packed)
    return out


@functools.cache
def activation_levels() -> int:
    """127; or 63 on a processor without VNNI, where FBGEMM adds pairs of products in 16 bits, which then overflow."""
    ones = torch.quantize_per_channel(
        torch.ones(32, 64), torch.full((32,), 1 / 127), torch.zeros(32, dtype=torch.int64), 0, torch.qint8
    )
    out = _int8_matmul(torch.ones(1, 64), torch.ops.quantized.linear_prepack(ones, None), 127)
    return 127 if (out - 64).abs().max() < 0.01 else 63


class WeightOnlyInt8Linear(nn.Module):
    """8-bit weights, a scale per output; activations keep their dtype. Where FBGEMM is not: CUDA, ARM.

    On CUDA the conversion is written out, and is only free where torch.compile fuses it into the product.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp_min(TINY) / 127
        self.weight = (weight.float() / scale.unsqueeze(1)).round_().to(torch.int8)
        self.scale = scale.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.linear(x, self.weight.to(x.dtype)).mul_(self.scale)
        out = torch._weight_int8pack_mm(x.flatten(0, -2).contiguous(), self.weight, self.scale)
        return out.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """4-bit weights in groups of 32 inputs, each group with a bf16 scale and zero; bf16 activations. tinygemm's kernel.

    A weight is (q - 8) * scale + zero. Raises InvalidInputError when the groups do not divide K.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.outputs, inputs = weight.shape
        tile = 128 if weight.is_cuda else INT4_GROUP
        if inputs % tile:
            raise InvalidInputError(f"int4 needs layers whose width is a multiple of {tile}, not {inputs}.", "quantize")
        padded = F.pad(weight.float(), (0, 0, 0, -len(weight) % 64))  # the kernels want multiples of 64
        groups = padded.view(len(padded), -1, INT4_GROUP)
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        scale = ((high - low) / 15).clamp_min(TINY).bfloat16()
        zero = (low + 8 * scale).bfloat16()
        q = ((groups - zero.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().add_(8).clamp_(0, 15).flatten(1).int()
        self.scales_and_zeros = torch.stack((scale.T, zero.T), dim=-1).contiguous()  # [K / 32, N, 2]
        if weight.is_cuda:
            pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
            self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        else:
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)

    def forward(self, x: Tensor) -> Tensor:
        matmul = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        out: Tensor = matmul(x.flatten(0, -2).contiguous(), self.packed, INT4_GROUP, self.scales_and_zeros)
        return out[:, : self.outputs].reshape(*x.shape[:-1], self.outputs)


class Fp8Linear(nn.Module):
    """float8_e4m3fn weights, a scale per output, times float8 activations, a scale per row. CUDA, from Hopper on."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.outputs = len(weight)
        padded = F.pad(weight.float(), (0, 0, 0, -len(weight) % 16))  # the kernel wants multiples of 16
        scale = padded.abs().amax(dim=1, keepdim=True).clamp_min(TINY) / FP8_MAX
        self.weight = (padded / scale).to(torch.float8_e4m3fn)
        self.scale = scale.T  # [1, N]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        scale = rows.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) / FP8_MAX
        eights = (rows / scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(eights, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=x.dtype)
        return out[:, : self.outputs].reshape(*x.shape[:-1], self.outputs)


class Fp16Linear(nn.Module):
    """fp16 weights, fp32 activations and sums: FBGEMM's packed kernel. The most exact of the modes."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out


class Bf16Linear(nn.Module):
    """bf16 weights in the order in which oneDNN reads them, bf16 activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out


Layer = type[Int8Linear | WeightOnlyInt8Linear | Int4Linear | Fp8Linear | Fp16Linear | Bf16Linear]


def layers_for(device: torch.device) -> dict[str, tuple[Layer, torch.dtype]]:
    """Mode -> its layer and the dtype of everything else, for the modes that ``device`` can compute."""
    half = torch.bfloat16
    if device.type == "cuda":
        modes: dict[str, tuple[Layer, torch.dtype]] = {"int8": (WeightOnlyInt8Linear, half), "int4": (Int4Linear, half)}
        if torch.cuda.get_device_capability(device) >= (9, 0):
            modes["fp8"] = (Fp8Linear, half)
        return modes
    if device.type != "cpu":
        return {}
    fbgemm = torch.backends.quantized.engine in {"fbgemm", "x86"}
    modes = {
        "int8": (Int8Linear, torch.float32) if fbgemm else (WeightOnlyInt8Linear, half),
        "int4": (Int4Linear, half),
    }
    if fbgemm:
        modes["fp16"] = (Fp16Linear, torch.float32)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        modes["bf16"] = (Bf16Linear, half)
    return modes


def layer_for(mode: str, device: torch.device) -> tuple[Layer, torch.dtype]:
    """The layer of a mode and the dtype of everything else. Raises InvalidInputError if ``device`` has no such mode."""
    modes = layers_for(device)
    if mode not in modes:
        offered = ", ".join(modes) or "none"
        raise InvalidInputError(f"There is no {mode} on {device.type} here; modes: {offered}.", "quantize")
    return modes[mode]


def choose(asked: str | None, profile: Profile, device: torch.device, large: bool) -> Quantization | None:
    """What ``Settings.quantize`` comes down to for one model on one device; None: the weights as they are.

    Unasked, a ``large`` model on the CPU gets 16 bits, which cost it nothing that can be measured and double its speed.
    Raises InvalidInputError for a mode that the device cannot compute or that the model's voice does not survive.
    """
    if asked is None:
        usual = Quantization(DEFAULT_ON_CPU)
        wanted = large and device.type == "cpu" and usual.mode in layers_for(device) and profile.allows(usual)
        return usual if wanted else None
    if asked == "off":
        return None
    quantization = Quantization.parse(asked)
    layer_for(quantization.mode, device)
    if not profile.allows(quantization):
        survived = ", ".join(profile.quantize or ()) or "off"
        raise InvalidInputError(f"{profile.name} does not survive {quantization}; it does: {survived}.", "quantize")
    return quantization


@torch.no_grad()
def quantize(model: CSM, quantization: Quantization) -> CSM:
    """Pack the weights of ``model`` in place, one layer after the other, and return it, for inference only.

    The peak is the model as it came and one layer. ``part`` "depth" leaves the backbone and its head alone; what stays
    is converted to the dtype that the mode's kernel computes in. Raises InvalidInputError when the device has no such
    mode or the layers not the widths for it.
    """
    layer, dtype = layer_for(quantization.mode, model.text_embedding.weight.device)
    whole = quantization.part == "all"
    # By name: a list of the layers themselves would keep all their weights alive until the last one is packed.
    scope = ("",) if whole else ("depth.", "projection")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in filter(lambda name: name.startswith(scope), linears):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer(model.get_parameter(f"{name}.weight")))
    heads = [layer(head.T) for head in model.audio_head]
    del model.audio_head
    model.add_module("audio_head", nn.ModuleList(heads))
    return model.to(dtype).eval().requires_grad_(False)
