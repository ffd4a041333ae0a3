"""The floor under a frame's time: the bytes that one frame has to read, by arithmetic from the model's shape.

At small batches a frame is bound by memory: the backbone is read once, the depth decoder K - 1 times, each codebook's
head once, the cache as far as it is filled. Embeddings are looked up, not read through; the codec is left out.
"""

from csm_core.config import ModelConfig, StackConfig
from csm_core.engine.memory import PACKED_BYTES, Precision


def frame_bytes(config: ModelConfig, precision: Precision, batch: int = 1, positions: int = 0) -> dict[str, int]:
    """Bytes read for one frame of ``batch`` streams that have ``positions`` in their caches, by part.

    Weights are read once for all streams, caches once for each.
    """
    passes = config.num_codebooks - 1  # the first depth pass reads two positions: hidden state and codebook 0
    plain = float(precision.number)
    packed = plain if precision.quantization is None else PACKED_BYTES[precision.quantization.mode]
    outer = plain if precision.quantization is not None and precision.quantization.part == "depth" else packed
    backbone, depth, entries = config.backbone, config.depth, config.audio_vocab_size
    cached = 2 * backbone.layers * backbone.kv_heads * backbone.head_dim * precision.number
    return {
        "backbone": round(outer * _matrices(backbone)),
        "depth": round(packed * passes * (_matrices(depth) + backbone.dim * depth.dim)),
        "heads": round(outer * backbone.dim * entries + packed * passes * depth.dim * entries),
        "kv": cached * positions * batch,
    }


def _matrices(stack: StackConfig) -> int:
    attention = 2 * stack.dim * (stack.heads + stack.kv_heads) * stack.head_dim
    return stack.layers * (attention + 3 * stack.dim * stack.ffn_dim)
