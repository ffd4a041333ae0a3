"""Sesame's way as a peer: torchtune's Llama blocks and one frame after another. Imported only when it is asked for.

Their repository is no package, so this is its method (``generate_frame``) over the same torchtune parts, written anew:
masked sums of embeddings, a causal mask for the cache, a depth decoder whose cache starts afresh for every frame.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchtune
from torch import Tensor, nn
from torchtune.models import llama3_2

from csm_core.bench.peer_transformers import EXACT
from csm_core.bench.subject import Subject
from csm_core.config import ModelConfig, StackConfig
from csm_core.errors import InvalidInputError
from csm_core.model.layouts import join_pairs, lm_names


class SesamePeer:
    """Two torchtune decoders with the subject's weights, in bf16 unless the subject is small."""

    version = torchtune.__version__

    def __init__(self, subject: Subject) -> None:
        config = subject.model.config
        self._config, self._device = config, subject.codec.device
        self._temperature, self._top_k = subject.profile.temperature, subject.profile.top_k
        small = subject.parameters < EXACT
        self.dtype = subject.dtype if small else torch.bfloat16
        self._weights = _original(subject.model.state_dict(), config, self.dtype)
        scale = 1.0 if config.rope_scaling is None else config.rope_scaling.factor
        positions = {"backbone": config.max_seq_len, "decoder": config.num_codebooks}
        shapes = {"backbone": config.backbone, "decoder": config.depth}
        self._stacks = {
            name: _stack(shapes[name], config, positions[name], scale, self._part(name)) for name in positions
        }
        for name, stack in self._stacks.items():
            stack.to(self._device).eval()
            with self._device:
                stack.setup_caches(1, self.dtype, decoder_max_seq_len=positions[name])
        self._masks = {
            name: torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
            for name, length in positions.items()
        }

    def _part(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): w for key, w in self._weights.items() if key.startswith(f"{name}.")}

    @torch.inference_mode()
    def frames(self, text_ids: Sequence[int], count: int, greedy: bool = False) -> Tensor:
        """The prompt in one pass, then a frame at a time."""
        heat = 0.0 if greedy else self._temperature
        columns = self._config.num_codebooks + 1
        frames = torch.zeros(1, len(text_ids), columns, dtype=torch.int64, device=self._device)
        frames[0, :, -1] = torch.tensor(list(text_ids), device=self._device)
        present = torch.zeros_like(frames, dtype=torch.bool)
        present[..., -1] = True
        positions = torch.arange(len(text_ids), device=self._device).unsqueeze(0)
        self._stacks["backbone"].reset_caches()
        made = []
        for _ in range(count):
            codes = self._frame(frames, present, positions, heat)
            made.append(codes)
            frames = nn.functional.pad(codes, (0, 1)).unsqueeze(1)
            present = torch.ones_like(frames, dtype=torch.bool)
            present[..., -1] = False
            positions = positions[:, -1:] + 1
        return torch.cat(made).cpu()

    def _frame(self, frames: Tensor, present: Tensor, positions: Tensor, heat: float) -> Tensor:
        weights, backbone, depth = self._weights, self._stacks["backbone"], self._stacks["decoder"]
        summed = (self._embed(frames) * present.unsqueeze(-1)).sum(dim=2)
        hidden = backbone(summed, input_pos=positions, mask=self._masks["backbone"][positions]).to(self.dtype)[:, -1]
        codes = [self._pick(hidden @ weights["codebook0_head.weight"].T, heat)]
        read = torch.stack((hidden, self._audio(codes[0], 0)), dim=1)
        at = torch.arange(2, device=self._device).unsqueeze(0)
        depth.reset_caches()
        for codebook in range(1, self._config.num_codebooks):
            projected = read @ weights["projection.weight"].T
            out = depth(projected, input_pos=at, mask=self._masks["decoder"][at]).to(self.dtype)
            codes.append(self._pick(out[:, -1] @ weights["audio_head"][codebook - 1], heat))
            read, at = self._audio(codes[codebook], codebook).unsqueeze(1), at[:, -1:] + 1
        return torch.stack(codes, dim=1)

    def _embed(self, frames: Tensor) -> Tensor:
        """[1, T, K+1] -> [1, T, K+1, dim]."""
        offsets = torch.arange(self._config.num_codebooks, device=self._device) * self._config.audio_vocab_size
        audio = nn.functional.embedding(frames[..., :-1] + offsets, self._weights["audio_embeddings.weight"])
        text = nn.functional.embedding(frames[..., -1:], self._weights["text_embeddings.weight"])
        return torch.cat((audio, text), dim=2)

    def _audio(self, codes: Tensor, codebook: int) -> Tensor:
        rows = codes + codebook * self._config.audio_vocab_size
        return nn.functional.embedding(rows, self._weights["audio_embeddings.weight"])

    def _pick(self, logits: Tensor, heat: float) -> Tensor:
        """Top-k at a temperature without a host sync: the smallest of exponential waiting times."""
        if heat == 0:
            return logits.argmax(dim=-1)
        logits = logits / heat
        least = logits.topk(min(self._top_k, logits.shape[-1])).values[:, -1:]
        chances = logits.masked_fill(logits < least, float("-inf")).softmax(dim=-1)
        return (chances / torch.empty_like(chances).exponential_(1)).argmax(dim=-1)


def build(subject: Subject) -> SesamePeer:
    return SesamePeer(subject)


def _original(weights: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under the original's names, rotary pairs side by side as torchtune has them."""
    named = {}
    for name, native in lm_names("original", config).items():
        weight = weights[native].to(dtype)
        if native.endswith((".q_proj.weight", ".k_proj.weight")):
            stack = config.backbone if native.startswith("backbone.") else config.depth
            weight = join_pairs(weight, stack.head_dim)
        named[name] = weight
    return named


def _stack(shape: StackConfig, config: ModelConfig, positions: int, scale: float, weights: dict[str, Tensor]) -> Any:
    if shape.heads * shape.head_dim != shape.dim:
        raise InvalidInputError("The peer sesame needs heads that share the width evenly.", "peer")
    dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        stack = llama3_2.llama3_2(
            vocab_size=8,  # its own embedding and output are not used
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            embed_dim=shape.dim,
            max_seq_len=positions,
            intermediate_dim=shape.ffn_dim,
            norm_eps=config.norm_eps,
            rope_base=int(config.rope_theta),
            scale_factor=int(scale),
        )
    stack.tok_embeddings, stack.output = nn.Identity(), nn.Identity()
    stack.load_state_dict(weights, assign=True)
    for layer in stack.layers:
        layer.attn.pos_embeddings.rope_init()  # left out on the meta device
    return stack.to(dtype)
