"""Mimi's decoder for streams, made of products: codes -> PCM, with the state of all rows in three tensors.

The weights are those of moshi's modules and the sums are theirs in another order; a short chunk costs a quarter.
Knows no Codec, no lock, and checks no codes. Everything is fp32.
Shapes: b rows, n frames, T positions or samples, C channels, K codebooks; channels come last.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from moshi.modules.conv import StreamingConv1d
from moshi.modules.seanet import SEANetResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

Play = Callable[[], Tensor]
Record = Callable[[Play], Play]

# oneDNN's packed layout is read faster than F.linear reads a matrix, but its call costs 10 us more. One core, weights
# not in the cache: 2 rows by 512 x 2048 take 610 us plain and 330 packed, 96 rows by 96 x 48 take 16 and 23.
PACK_FROM = 2**17  # weights
PACK_ROWS = 16  # the layout is chosen for that many; the one for 1 to 4 rows is 40 % slower at 2 rows, of all things


class Affine:
    """x [..., in] -> x W^T + bias [..., out], with the weight [out, in] as the device reads it fastest."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.packed = weight.numel() >= PACK_FROM and weight.device.type == "cpu" and _can_pack()
        self.weight = weight.contiguous()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACK_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def _can_pack() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.backends.cpu.get_cpu_capability().startswith("AVX")


class History:
    """What the convolutions of b streams remember, for one pass: each takes its part in turn and leaves the next.

    ``floats`` [b, all of it] is cut into ``parts`` [b, positions, channels].
    """

    def __init__(self, floats: Tensor, parts: Sequence[Tensor]) -> None:
        self._floats, self._parts = floats, parts
        self._left: list[Tensor] = []

    def before(self, x: Tensor) -> Tensor:
        """``x`` [b, T, C] behind the positions that the next convolution remembers; the last of both are left."""
        part = self._parts[len(self._left)]
        x = torch.cat((part, x), dim=1)
        self._left.append(x[:, -part.shape[1] :])
        return x

    def close(self, active: Tensor) -> None:
        """Write down what was left, in the rows that are ``active``."""
        left = torch.cat([part.flatten(1) for part in self._left], dim=1)
        self._floats.copy_(torch.where(active.unsqueeze(1), left, self._floats))


@dataclass(frozen=True)
class CausalConv:
    """A causal convolution as one product: windows [T, (taps, in)] by a matrix [(upsampling, out), (taps, in)].

    A transposed convolution is one too: with stride s and a kernel of taps * s, the s outputs from t * s on depend on
    the inputs t - taps + 1 .. t alone. So of either kind a stream has to remember the last (taps - 1) * dilation
    inputs, which are zeros at first. ``after_elu``: ELU is applied to the input.
    """

    product: Affine
    channels: int  # of the input
    taps: int
    dilation: int = 1
    upsampling: int = 1
    after_elu: bool = False

    @property
    def past(self) -> int:
        return (self.taps - 1) * self.dilation

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """x [b, T, in] -> [b, T * upsampling, out]."""
        b, steps, _ = x.shape
        if self.after_elu:
            x = F.elu(x)
        if self.taps > 1:
            windows = history.before(x).unfold(1, self.past + 1, 1)  # [b, T, in, past + 1]
            x = windows[..., :: self.dilation].transpose(2, 3).reshape(b, steps, -1)
        return self.product(x).view(b, steps * self.upsampling, -1)


@dataclass(frozen=True)
class Residual:
    """x + the convolutions of x, one after the other."""

    convs: list[Any]

    def __call__(self, x: Tensor, history: History) -> Tensor:
        y = x
        for conv in self.convs:
            y = conv(y, history)
        return y.add_(x)


def _plain(conv: nn.Conv1d, after_elu: bool) -> CausalConv:
    matrix = conv.weight.transpose(1, 2).flatten(1)  # [out, (taps, in)]
    return CausalConv(
        Affine(matrix, conv.bias), conv.in_channels, conv.kernel_size[0], conv.dilation[0], after_elu=after_elu
    )


def _transposed(conv: nn.ConvTranspose1d, after_elu: bool = False, before: Tensor | None = None) -> CausalConv:
    """``before`` [in, earlier]: a product that comes first and is multiplied into the matrix."""
    stride, taps = conv.stride[0], conv.kernel_size[0] // conv.stride[0]
    weight = conv.weight.double()  # [in, out, (taps from the newest on, stride)]
    if conv.groups > 1:  # each channel alone: as a dense weight that is zero between channels
        weight = torch.diag_embed(weight[:, 0].T).permute(1, 2, 0)
    matrix = weight.view(*weight.shape[:2], taps, stride).flip(2).permute(3, 1, 2, 0)  # [stride, out, taps, in]
    if before is not None:
        matrix = matrix @ before.double()
    bias = None if conv.bias is None else conv.bias.repeat(stride)
    product = Affine(matrix.flatten(2).flatten(0, 1).float(), bias)
    return CausalConv(product, matrix.shape[3], taps, upsampling=stride, after_elu=after_elu)


def _stages(modules: Iterable[nn.Module]) -> list[Any]:
    """moshi's modules one after the other as CausalConvs and Residuals."""
    stages: list[Any] = []
    after_elu = False
    for module in modules:
        if isinstance(module, nn.ELU):
            after_elu = True
            continue
        if isinstance(module, SEANetResnetBlock):
            stages.append(Residual(_stages(module.block)))
        elif isinstance(module, StreamingConv1d):
            stages.append(_plain(module.conv.conv, after_elu))
        else:
            stages.append(_transposed(module.convtr.convtr, after_elu))  # type: ignore[union-attr,arg-type]
        after_elu = False
    return stages


class Layer:
    """The weights of one transformer layer."""

    def __init__(self, layer: Any) -> None:
        self.norms = [(norm.weight, norm.bias, norm.eps) for norm in (layer.norm1, layer.norm2)]
        self.scales = layer.layer_scale_1.scale, layer.layer_scale_2.scale
        self.qkv, self.out = Affine(layer.self_attn.in_projs[0].weight), Affine(layer.self_attn.out_projs[0].weight)
        self.up, self.down = Affine(layer.linear1.weight), Affine(layer.linear2.weight)


class Weights:
    """All weights of a decoder, for any number of StreamingDecoders. ``mimi``: a MimiModel or its half that speaks."""

    def __init__(self, mimi: Any) -> None:
        halves = [mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest]
        books = [layer.embedding for half in halves for layer in half.vq.layers[: half.n_q]]
        self.entries = torch.cat(books)  # [(K, codebook_size), codebook_dim]
        self.first_entry = torch.arange(len(books), device=self.entries.device) * len(books[0])
        projections = torch.cat([half.output_proj.weight[..., 0] for half in halves], dim=1)
        self.upsample = _transposed(mimi.upsample.convtr.convtr.convtr, before=projections)
        transformer = mimi.decoder_transformer.transformer
        self.layers = [Layer(layer) for layer in transformer.layers]
        attention = transformer.layers[0].self_attn
        self.heads, self.head_dim = attention.num_heads, attention.embed_dim // attention.num_heads
        self.context = attention.context
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float32, device=self.entries.device)
        self.frequencies = torch.exp(pairs * (-2 * math.log(transformer.max_period) / self.head_dim))
        self.seanet = _stages(mimi.decoder.model)
        stages = [self.upsample, *self.seanet]
        convs = [conv for stage in stages for conv in (stage.convs if isinstance(stage, Residual) else [stage])]
        self.remembered = [(conv.past, conv.channels) for conv in convs if conv.past]
        self.frame_size = math.prod(conv.upsampling for conv in convs)


class _Rows:
    """The state of the rows ``at`` as a pass wants it, cut up once: every cut is an operation, and those add up."""

    def __init__(self, state: Sequence[Tensor], remembered: Sequence[tuple[int, int]], at: slice) -> None:
        self.at, b = at, at.stop - at.start
        self.floats, ring, self.position = (tensor[at] for tensor in state)
        cuts = torch.split(self.floats, [positions * channels for positions, channels in remembered], dim=1)
        self.parts = [cut.view(b, *shape) for cut, shape in zip(cuts, remembered, strict=True)]
        # Per layer: where keys and values are written [b, cells, 2, heads, head_dim], and both as attention reads them.
        self.rings = [(layer.permute(0, 3, 1, 2, 4), layer[:, 0], layer[:, 1]) for layer in ring.unbind(1)]
        self.index = torch.arange(b, device=ring.device).unsqueeze(1)


def runs(active: Sequence[bool]) -> Iterator[slice]:
    """The rows that are active, neighbours together."""
    start = 0
    for is_active, group in groupby(active):
        stop = start + len(list(group))
        if is_active:
            yield slice(start, stop)
        start = stop


class StreamingDecoder:
    """``rows`` streams that advance and restart independently, by up to ``longest`` frames at a time.

    ``state`` are tensors [rows, ...], all zero for a stream that starts. The ring holds keys and values of more
    positions than attention sees, by the longest chunk: what a chunk overwrites none of its positions should still see,
    and what an inactive row writes is overwritten before anybody sees it.
    ``record`` turns a function over tensors that stay where they are into one that repeats what it did, a CUDA graph
    say; it is asked once per (b, n). The result of a recorded pass is overwritten by the next one.
    On the CPU an inactive row costs as much as another: there each run of active rows has a pass of its own. (The small
    voice on one core: 2 ms a pass and 1.2 ms for each frame of each row.)
    """

    def __init__(self, weights: Weights, rows: int, longest: int, record: Record | None = None) -> None:
        device = weights.entries.device
        self._weights = weights
        self._cells = weights.context + longest * weights.upsample.upsampling
        ring = rows, len(weights.layers), 2, weights.heads, self._cells, weights.head_dim
        self.state: Sequence[Tensor] = (
            torch.zeros(rows, sum(positions * channels for positions, channels in weights.remembered), device=device),
            torch.zeros(ring, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),  # the position that comes next
        )
        self._codes = torch.zeros(rows, longest, len(weights.first_entry), dtype=torch.int64, device=device)
        self._active = torch.zeros(rows, dtype=torch.bool, device=device)
        self._record = record
        self._whole = record is not None or device.type != "cpu"
        self._rows: dict[tuple[int, int], _Rows] = {}
        self._plays: dict[tuple[int, int, int], Play] = {}

    def decode(self, codes: Tensor, active: Tensor) -> Tensor:
        """Codes [b, n, K] of the first b rows, bool [b] -> PCM [b, samples]; other rows and inactive ones stay."""
        b, n, _ = codes.shape
        if self._whole:
            return self._decode(slice(0, b), codes, active)
        pcm = torch.zeros(b, n * self._weights.frame_size)
        for at in runs(active.tolist()):
            pcm[at] = self._decode(at, codes[at], active[at])
        return pcm

    def _decode(self, at: slice, codes: Tensor, active: Tensor) -> Tensor:
        """One pass over the rows ``at``."""
        n, which = codes.shape[1], (at.start, at.stop)
        if which not in self._rows:
            self._rows[which] = _Rows(self.state, self._weights.remembered, at)
        if (*which, n) not in self._plays:
            play = partial(self._pass, self._rows[which], n)
            self._active.zero_()  # a recording may run it for practice
            self._plays[*which, n] = play if self._record is None else self._record(play)
        self._codes[at, :n] = codes
        self._active[at] = active
        return self._plays[*which, n]()

    def _pass(self, rows: _Rows, n: int) -> Tensor:
        """Tensor code alone: no look at a value, no shape that depends on one, the state changed in place."""
        weights, active = self._weights, self._active[rows.at]
        history = History(rows.floats, rows.parts)
        codes = self._codes[rows.at, :n] + weights.first_entry
        entries = F.embedding(codes, weights.entries)  # [b, n, K, codebook_dim]
        x = torch.cat((entries[:, :, 0], entries[:, :, 1:].sum(2)), dim=-1)
        x = self._attend(weights.upsample(x, history), rows)
        for stage in weights.seanet:
            x = stage(x, history)
        history.close(active)
        rows.position.add_(active * (n * weights.upsample.upsampling))
        return x[..., 0]

    def _attend(self, x: Tensor, rows: _Rows) -> Tensor:
        """The transformer: x [b, T, C] -> [b, T, C] at the rows' next positions."""
        weights, (b, steps, channels) = self._weights, x.shape
        positions = rows.position.unsqueeze(1) + torch.arange(steps, device=x.device)  # [b, T]
        rotation, visible = self._rotation(positions), self._visible(positions)
        cell = positions % self._cells
        for layer, (ring, keys, values) in zip(weights.layers, rows.rings, strict=True):
            qkv = layer.qkv(F.layer_norm(x, (channels,), *layer.norms[0]))
            qkv.view(torch.complex64).mul_(rotation)
            qkv = qkv.view(b, steps, 3, weights.heads, -1)
            ring.index_put_((rows.index, cell), qkv[:, :, 1:])
            y = F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), keys, values, visible)
            x = torch.addcmul(x, layer.scales[0], layer.out(y.transpose(1, 2).reshape(b, steps, channels)))
            y = F.gelu(layer.up(F.layer_norm(x, (channels,), *layer.norms[1])))
            x = torch.addcmul(x, layer.scales[1], layer.down(y))
        return x

    def _rotation(self, positions: Tensor) -> Tensor:
        """RoPE for the pairs of query, key and value as complex numbers [b, T, 3 C / 2]; the value is not turned."""
        weights = self._weights
        angles = positions.unsqueeze(-1).float() * weights.frequencies
        turn = torch.polar(torch.ones_like(angles), angles).repeat(1, 1, 2 * weights.heads)
        return F.pad(turn, (0, turn.shape[-1] // 2), value=1.0)

    def _visible(self, positions: Tensor) -> Tensor:
        """0 where a position may look at a cell of the ring, else minus infinity: [b, 1, T, cells]."""
        last = positions[:, -1:]
        held = last - (last - torch.arange(self._cells, device=last.device)) % self._cells  # in each cell, if >= 0
        distance = positions.unsqueeze(2) - held.unsqueeze(1)
        hidden = (held < 0).unsqueeze(1) | (distance < 0) | (distance >= self._weights.context)
        return torch.zeros_like(distance, dtype=torch.float32).masked_fill_(hidden, -math.inf).unsqueeze(1)
