"""Draw codes from logits: temperature, top-k and seed per row, on the device, without a host sync.

The noise is a pure function of (seed, frame, codebook, entry), so a row draws the same codes whatever else is in the
batch and wherever it stands. Knows no slots, no requests and no model.
"""

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: keeps seed 0, frame 0, codebook 0 off the hash's fixed point 0


def mix(x: Tensor) -> Tensor:
    """Bijective 32-bit hash in int64 tensors: "lowbias32" of Chris Wellons's hash-prospector (public domain).

    Its author measures less than two thirds of the avalanche bias of MurmurHash3's finaliser. The second factor,
    0x846ca68b, is written as -0x7b935975, its equal mod 2**32: so no product leaves int64, where overflow is undefined.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * -0x7B935975 & WORD
    return x ^ (x >> 16)


def gumbel(seed: Tensor, frame: Tensor, num_codebooks: int, entries: int) -> Tensor:
    """Standard Gumbel noise fp32 [B, num_codebooks, entries] for rows with ``seed`` and ``frame``, both int64 [B].

    -log(-log(1 - V)) with V uniform in 2**-33 .. 1 - 2**-24: full resolution where it counts, at the large values, so
    that an entry of probability 2**-32 still has its chance; finite everywhere.
    """
    device = seed.device
    key = mix(mix(seed & WORD ^ GOLDEN) ^ (seed >> 32 & WORD))  # [B]
    key = mix(key ^ (frame & WORD))
    codebooks = mix(torch.arange(1, num_codebooks + 1, device=device))
    columns = mix(torch.arange(1, entries + 1, device=device) ^ GOLDEN)
    keys = mix(key[:, None] ^ codebooks)  # [B, K]
    uniform = (mix(keys[:, :, None] ^ columns).float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


class Draw(NamedTuple):
    """How the rows of one frame are drawn, ready for ``sample``: [B, 1] both. Made once for all codebooks."""

    heat: Tensor  # what logits are divided by; 1 where the temperature is 0
    rank: Tensor  # place of the last entry that is not out, among the sorted

    @staticmethod
    def of(temperature: Tensor, top_k: Tensor, limit: int) -> "Draw":
        """``limit`` >= every ``top_k`` that counts, known to the host, is how many entries ``sample`` sorts."""
        heat = torch.where(temperature > 0, temperature.clamp(min=1e-6), 1.0)
        return Draw(heat.unsqueeze(1), (top_k.clamp(1, limit) - 1).unsqueeze(1))


def sample(logits: Tensor, noise: Tensor, draw: Draw, limit: int) -> Tensor:
    """Draw one entry per row: ``logits`` and ``noise`` [B, V] -> int64 [B].

    Gumbel-max (Gumbel 1954): argmax(logits / t + noise) is distributed as softmax(logits / t), and with noise 0 it is
    argmax(logits). Entries below the top_k-th largest logit are out. Of 2048 entries on one core torch.topk(50) takes
    7 us, a full sort 55 us: so ``limit`` is what is sorted.
    """
    logits = logits.float()
    threshold = logits.topk(min(limit, logits.shape[-1])).values.gather(1, draw.rank)
    return (logits.masked_fill(logits < threshold, float("-inf")) / draw.heat + noise).argmax(dim=-1)
