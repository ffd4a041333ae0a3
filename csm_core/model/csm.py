"""The whole network of CSM: embeddings, backbone over frames, depth decoder over the codebooks of a frame, heads.

Training and inference share it. It knows nothing of text, audio, sampling or where weights come from.
Shapes: B rows, T frames, K codebooks, V entries per codebook, S cached positions, D head size, N loose frames.
With a cache, all that a pass does is on tensors of fixed shape: no value is read on the host, so a pass can be compiled
and recorded.
Architecture: Sesame's "Crossing the uncanny valley of voice" and its CSM-1B release; blocks as in Llama 3.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm_core.config import ModelConfig, RopeScaling, StackConfig
from csm_core.model.kv_cache import KVCache, write

ABSENT = -1  # in a frame's column: nothing there, adds no embedding

Rotation = tuple[Tensor, Tensor]  # cosine and signed sine, [B or 1, 1, T, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> what q [B, heads, T, D] attends to
LayerAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # the same, told the layer
Pick = Callable[[Tensor, int], Tensor]  # (logits [B, V], codebook) -> codes [B]


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each rotated pair, fp32 ``[head_dim / 2]``.

    With ``scaling``, the Llama 3.1 rule: wavelengths above ``original_len / low_freq_factor`` are stretched by
    ``factor``, those below ``original_len / high_freq_factor`` kept, the ones between interpolated. Only the ratios of
    the three count, so Transformers' two sets for CSM-1B (original length 1024 in the backbone, 16 in the depth
    decoder, factors smaller alike) are both the original's 8192, 1, 4.
    """
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_len * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


class Rotary(nn.Module):
    """Tables ``[length, head_dim]`` of cosines and of sines, negative in their first half: always fp32, always filled.

    Built on the CPU even under ``torch.device("meta")``, so a model whose weights are assigned later needs no more than
    ``.to(device)``; rebuilt after ``.to()`` and ``to_empty()``, which would round them to bf16 or leave them unset.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.head_dim, self.length, self.theta, self.scaling = head_dim, length, theta, scaling
        self._build(torch.device("cpu"))

    def _build(self, device: torch.device) -> None:
        frequencies = rotary_frequencies(self.head_dim, self.theta, self.scaling)
        angles = torch.arange(self.length, device="cpu").float()[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).to(device), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._build(self.cos.device)
        return self

    def forward(self, positions: Tensor) -> Rotation:
        """``positions`` [B, T] -> cos, sin [B, 1, T, D], ready to meet heads."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of ``x`` [B, heads, T, D] in fp32; the half-split layout of Transformers.

    (a, b) becomes (a cos - b sin, b cos + a sin): three operations where each half by itself takes seven.
    """
    cos, sin = rotation
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


def attend_causally(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees itself and those before it; nothing is kept. The training path."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention with the query heads of a group laid out as further queries of their one KV head.

    Equal to repeating K and V, without the copies, and open to kernels that take a mask but no groups.
    ``q`` [B, heads, T, D], ``k``/``v`` [B, kv_heads, S, D], ``mask`` [B, 1, groups * T, S] is
    added to the scores.
    """
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


class Attention(nn.Module):
    def __init__(self, stack: StackConfig) -> None:
        super().__init__()
        self.head_dim = stack.head_dim
        self.q_proj = nn.Linear(stack.dim, stack.heads * stack.head_dim, bias=False)
        self.k_proj = nn.Linear(stack.dim, stack.kv_heads * stack.head_dim, bias=False)
        self.v_proj = nn.Linear(stack.dim, stack.kv_heads * stack.head_dim, bias=False)
        self.o_proj = nn.Linear(stack.heads * stack.head_dim, stack.dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        split = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)  # [B, heads, T, D]
        k = self.k_proj(x).unflatten(-1, split).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)
        out: Tensor = attend(rotate(q, rotation), rotate(k, rotation), v)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    def __init__(self, stack: StackConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(stack.dim, stack.ffn_dim, bias=False)
        self.up_proj = nn.Linear(stack.dim, stack.ffn_dim, bias=False)
        self.down_proj = nn.Linear(stack.ffn_dim, stack.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    def __init__(self, stack: StackConfig, norm_eps: float) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(stack.dim, eps=norm_eps)
        self.attn = Attention(stack)
        self.mlp_norm = nn.RMSNorm(stack.dim, eps=norm_eps)
        self.mlp = MLP(stack)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotation, attend)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Place(NamedTuple):
    """Where the positions of a pass stand: their rotation, where a cache keeps them, what they see of it.

    ``at`` [B * kv_heads * T] is ``KVCache.index``; ``mask`` [B, 1, groups * T, S] is ``KVCache.mask``, laid out for
    ``attend_grouped``; ``rows`` [B] are the cache's rows, None for the first B.
    """

    rotation: Rotation
    at: Tensor
    mask: Tensor
    rows: Tensor | None


def cached_block(block: nn.Module, x: Tensor, keys: Tensor, values: Tensor, place: Place) -> Tensor:
    """One layer over its part of a cache: write there first, then attend to what is there.

    Nothing but tensors goes in, and the same for every layer: compiled once, it serves all layers of a stack.
    """

    def keep(kept: Tensor, new: Tensor) -> Tensor:
        write(kept, new, place.at)
        seen = kept[:, :, : place.mask.shape[-1]]
        return seen[: x.shape[0]] if place.rows is None else seen[place.rows]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_grouped(q, keep(keys, k), keep(values, v), place.mask)

    out: Tensor = block(x, place.rotation, attend)
    return out


RunBlock = Callable[[nn.Module, Tensor, Tensor, Tensor, Place], Tensor]  # cached_block, or a compiled one


class Stack(nn.Module):
    """Llama-style transformer over a whole sequence, or over the next positions of one whose past is cached."""

    def __init__(self, stack: StackConfig, max_len: int, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(stack, config.norm_eps) for _ in range(stack.layers))
        self.norm = nn.RMSNorm(stack.dim, eps=config.norm_eps)
        self.rotary = Rotary(stack.head_dim, max_len, config.rope_theta, config.rope_scaling)
        self.groups = stack.heads // stack.kv_heads

    def forward(self, x: Tensor, positions: Tensor, attend: LayerAttend = attend_causally) -> Tensor:
        """``x`` [B, T, dim] at ``positions`` [B, T] or [1, T] -> the same shape, after the final norm."""
        # The residual keeps the weights' dtype: under autocast a bf16 input with an fp32 norm weight would be both
        # less exact and off the fused path of RMSNorm.
        x = x.to(self.norm.weight.dtype)
        rotation = self.rotary(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, partial(attend, index))
        out: Tensor = self.norm(x)
        return out

    def place(self, cache: KVCache, positions: Tensor, rows: Tensor | None = None) -> Place:
        """What ``step`` needs to know of ``positions`` [B, T] in ``rows`` [B] (default 0 .. B-1) of ``cache``."""
        mask = cache.mask(positions).unsqueeze(2).expand(-1, -1, self.groups, -1, -1).flatten(2, 3)
        return Place(self.rotary(positions), cache.index(positions, rows), mask, rows)

    def step(self, x: Tensor, cache: KVCache, place: Place, run: RunBlock = cached_block) -> Tensor:
        """``x`` [B, T, dim] at a place in the cache -> the same shape, after the final norm."""
        x = x.to(self.norm.weight.dtype)
        for index, layer in enumerate(self.layers):
            x = run(layer, x, cache.keys[index], cache.values[index], place)
        out: Tensor = self.norm(x)
        return out


class Scratch:
    """What ``decode_frame`` needs beside the weights for up to ``rows`` rows, and then does not allocate.

    That is the depth decoder's cache, and its positions: 0 and 1 in one pass, then each by itself.
    """

    def __init__(self, model: "CSM", rows: int) -> None:
        count, table = model.config.num_codebooks, model.audio_embedding.weight
        self.cache = KVCache(model.config.depth, rows, count, table.dtype, table.device)
        positions = torch.arange(count, device=table.device).unsqueeze(0)
        passes = [positions[:, :2], *(positions[:, k : k + 1] for k in range(2, count))]
        everywhere = torch.arange(rows, device=table.device)
        self._places = [model.depth.place(self.cache, each, everywhere)._replace(rows=None) for each in passes]

    def places(self, rows: int) -> list[Place]:
        """Those of the first ``rows`` rows, one for each pass."""
        return [place._replace(at=place.at[: len(place.at) // self.cache.rows * rows]) for place in self._places]


class CSM(nn.Module):
    """Conversational Speech Model. A frame is int64 ``[K+1]``: K codes, then a text token, or ``ABSENT`` for either."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, depth_dim, entries = config.backbone.dim, config.depth.dim, config.audio_vocab_size
        self.text_embedding = nn.Embedding(config.text_vocab_size, dim)
        self.audio_embedding = nn.Embedding(config.num_codebooks * entries, dim)
        self.backbone = Stack(config.backbone, config.max_seq_len, config)
        self.depth = Stack(config.depth, config.num_codebooks, config)
        self.projection = nn.Linear(dim, depth_dim, bias=False)
        self.codebook0_head = nn.Linear(dim, entries, bias=False)
        self.audio_head = nn.Parameter(torch.empty(config.num_codebooks - 1, depth_dim, entries))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Fresh weights for training: normal with ``std``, over sqrt(2 layers) where a block writes to the residual."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.normal_(self.audio_head, std=std)
        for stack in (self.backbone, self.depth):
            residual_std = std / math.sqrt(2 * len(stack.layers))
            for name, weight in stack.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.normal_(weight, std=residual_std)

    def embed(self, frames: Tensor) -> Tensor:
        """``frames`` [B, T, K+1] -> the sum of the embeddings of their present columns [B, T, dim]."""
        codes, text = frames[..., :-1], frames[..., -1]
        table = self.audio_embedding.weight
        offsets = torch.arange(codes.shape[-1], device=codes.device) * self.config.audio_vocab_size
        # One weighted bag per frame: never holds [B, T, K, dim] (0.5 GB in fp32 for a full CSM-1B prompt), and
        # trains 3 x faster than embedding, mask and sum (9 against 27 ms for 2048 frames of 8 x 384, one CPU core).
        audio = F.embedding_bag(
            (codes.clamp(min=0) + offsets).flatten(0, -2),
            table,
            per_sample_weights=(codes >= 0).flatten(0, -2).to(table.dtype),
            mode="sum",
        )
        spoken = self.text_embedding(text.clamp(min=0)) * (text >= 0).unsqueeze(-1)
        embedded: Tensor = audio.view_as(spoken) + spoken
        return embedded

    def forward_backbone(
        self,
        frames: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
        run: RunBlock = cached_block,
    ) -> Tensor:
        """``frames`` [B, T, K+1] -> hidden [B, T, dim] after the final norm; ``positions`` [B, T], default 0 .. T-1.

        Without a cache: plain causal attention over the T frames. With one: the keys and values are written to the
        cache's ``rows`` [B] (default 0 .. B-1) first, then each frame attends to the positions up to its own. Rows
        shorter than T may be padded on the right: such a position is overwritten before any frame may attend to it.
        """
        batch, length = frames.shape[:2]
        if positions is None:
            positions = torch.arange(length, device=frames.device).unsqueeze(0)
        x = self.embed(frames)
        if cache is None:
            hidden: Tensor = self.backbone(x, positions)
            return hidden
        return self.backbone.step(x, cache, self.backbone.place(cache, positions.expand(batch, -1), rows), run)

    def codebook0_logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [..., dim] -> logits of codebook 0 [..., V]."""
        logits: Tensor = self.codebook0_head(hidden)
        return logits

    def audio_logits(self, hidden: Tensor, codebook: int) -> Tensor:
        """The depth decoder's ``hidden`` [N, depth dim] -> logits of a ``codebook`` >= 1 [N, V]."""
        head = self.audio_head[codebook - 1]  # a matrix, or what quantize.py put in its place: a module that multiplies
        logits: Tensor = head(hidden) if isinstance(head, nn.Module) else hidden @ head
        return logits

    def depth_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Teacher forcing: ``hidden`` [N, dim] and its frame's ``codes`` [N, K] -> logits of codebooks 1.. [N, K-1, V].

        Depth position 0 is the backbone's hidden state, position k the code of codebook k-1; the output at position
        k >= 1 predicts codebook k, so the last code is not read.
        """
        count = self.config.num_codebooks
        offsets = torch.arange(count - 1, device=codes.device) * self.config.audio_vocab_size
        previous = self.audio_embedding(codes[:, :-1] + offsets)  # [N, K-1, dim]
        x = self.projection(torch.cat((hidden.unsqueeze(1).type_as(previous), previous), dim=1))
        positions = torch.arange(count, device=codes.device).unsqueeze(0)
        out = self.depth(x, positions)[:, 1:]
        return torch.matmul(out.transpose(0, 1), self.audio_head).transpose(0, 1)

    def decode_frame(
        self, hidden: Tensor, pick: Pick, scratch: Scratch | None = None, run: RunBlock = cached_block
    ) -> Tensor:
        """Choose the K codes of one frame per row: ``hidden`` [B, dim] -> codes int64 [B, K]; no host sync.

        ``pick(logits [B, V], k)`` chooses codebook k's codes [B] from the logits given the codebooks before it.
        ``scratch`` is one for B rows or more; by default it is made anew.
        """
        scratch = scratch or Scratch(self, hidden.shape[0])
        scratch.cache.clear(hidden.shape[0])
        codes = [pick(self.codebook0_logits(hidden), 0)]
        x = torch.stack((hidden, self.audio_embedding(codes[0])), dim=1)
        for k, place in enumerate(scratch.places(hidden.shape[0]), start=1):
            out = self.depth.step(self.projection(x), scratch.cache, place, run)
            codes.append(pick(self.audio_logits(out[:, -1], k), k))
            x = self.audio_embedding(codes[k] + k * self.config.audio_vocab_size).unsqueeze(1)
        return torch.stack(codes, dim=1)
