"""How much memory a model, its slots and its caches take together: arithmetic from shapes, before any is allocated.

Everything that grows with slots or context is allocated once, at start-up, so this is known beforehand: what does not
fit is refused with what would, instead of failing under load. Knows no tensor and no device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from csm_core.config import CodecConfig, EngineConfig, ModelConfig, Quantization, StackConfig
from csm_core.errors import InsufficientMemoryError

GB = 1e9

# Bytes of a packed weight with its share of the scales: int8 and fp8 one fp32 scale (and FBGEMM one sum) per output,
# whose inputs are 1024 or more in CSM-1B; int4 four bytes per group of 32.
PACKED_BYTES = {"int8": 1.01, "fp8": 1.01, "int4": 0.5 + 4 / 32, "fp16": 2.0, "bf16": 2.0}
LOADING_BYTES = 2  # a model that will be quantised is read as bf16


@dataclass(frozen=True)
class Precision:
    """``number``: bytes of an unpacked weight, an activation and a cached key; ``quantization``: what is packed."""

    number: int
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes, by what they are for."""

    weights: int
    codec: int  # the listening half, placed on first need, and the speaking one, twice: streams have their own layout
    slots: int  # all slots: keys and values, codec state, and the work of a step
    prefixes: int  # the prefix cache when it is full
    loading: int  # what is taken when the weights are read and none is packed yet

    @property
    def total(self) -> int:
        return max(self.weights + self.codec + self.slots + self.prefixes, self.loading)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "codec": self.codec, "slots": self.slots, "prefix cache": self.prefixes}
        return f"{self.total / GB:.2f} GB: " + ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())


@dataclass(frozen=True)
class Shapes:
    """What a plan is made from, apart from how it is run. ``codec_bytes`` of the codec's weights, fp32."""

    model: ModelConfig
    codec: CodecConfig
    codec_bytes: int


def plan(shapes: Shapes, engine: EngineConfig, precision: Precision) -> Plan:
    """The memory of one generator."""
    unpacked = weight_bytes(shapes.model, Precision(LOADING_BYTES))
    return Plan(
        weights=weight_bytes(shapes.model, precision),
        codec=shapes.codec_bytes * 3 // 2,
        slots=engine.slots * slot_bytes(shapes, engine, precision) + prefill_bytes(shapes.model, engine, precision),
        prefixes=engine.prefix_cache_bytes,
        loading=0 if precision.quantization is None else unpacked + shapes.codec_bytes,
    )


def largest_slots(shapes: Shapes, engine: EngineConfig, precision: Precision, available: int) -> int:
    """How many slots fit into ``available`` bytes, all else as it is; 0 when not even one does."""
    one = plan(shapes, replace(engine, slots=1), precision)
    if one.total > available:
        return 0
    spare = available - (one.weights + one.codec + one.slots + one.prefixes)
    return 1 + spare // slot_bytes(shapes, engine, precision)


def check_fits(shapes: Shapes, engine: EngineConfig, choices: Sequence[Precision], free: int | None) -> Plan:
    """The plan for the first of ``choices`` if it fits into ``free`` bytes (None: unknown, and trusted).

    Else InsufficientMemoryError, which says what would: fewer slots, or one of the other choices.
    """
    planned = plan(shapes, engine, choices[0])
    if free is None or planned.total <= free:
        return planned
    found = f"This needs {planned} with {engine.slots} slots, and {free / GB:.2f} GB are free"
    for precision in choices:
        if slots := largest_slots(shapes, engine, precision, free):
            how = "" if precision is choices[0] else f" with CSM_QUANTIZE={precision.quantization or 'off'}"
            raise InsufficientMemoryError(f"{found}: {min(slots, engine.slots)} slots would fit{how}.")
    raise InsufficientMemoryError(f"{found}: no number of slots and no quantisation of this model fits.")


def weight_bytes(model: ModelConfig, precision: Precision) -> int:
    """Of the language model."""
    depth_matrices = _stack_weights(model.depth) + model.backbone.dim * model.depth.dim
    depth_matrices += (model.num_codebooks - 1) * model.depth.dim * model.audio_vocab_size
    matrices = _stack_weights(model.backbone) + model.backbone.dim * model.audio_vocab_size + depth_matrices
    norms = sum((2 * stack.layers + 1) * stack.dim for stack in (model.backbone, model.depth))
    embeddings = (model.text_vocab_size + model.num_codebooks * model.audio_vocab_size) * model.backbone.dim
    if precision.quantization is None:
        return (embeddings + norms + matrices) * precision.number
    packed = matrices if precision.quantization.part == "all" else depth_matrices
    plain = embeddings + norms + matrices - packed
    return plain * precision.number + int(packed * PACKED_BYTES[precision.quantization.mode])


def slot_bytes(shapes: Shapes, engine: EngineConfig, precision: Precision) -> int:
    """Of one slot: the backbone's cache for the whole window, the depth decoder's, the codec's state, a step's work."""
    model, codec = shapes.model, shapes.codec
    cached = _cache_numbers(model.backbone, model.max_seq_len) + _cache_numbers(model.depth, model.num_codebooks)
    noise = model.num_codebooks * model.codebook_size * 3 * 8  # int64 hashes, and fp32 between them
    # The widest tensors of a chunk are those at the rate of the sound; about four are alive at once.
    sound = max(engine.chunk_schedule) * codec.frame_size * codec.decoder_filters * 4 * 4
    return cached * precision.number + codec_state_bytes(codec) + noise + sound


def codec_state_bytes(codec: CodecConfig, piece: int = 8) -> int:
    """What one stream of the codec's decoder remembers, fp32: attention's keys and values and the convolutions' edges.

    ``piece``: frames that it decodes at once, for which its ring of keys has room beside the context.
    """
    positions_per_frame = codec.frame_size // math.prod(codec.ratios)
    positions = codec.transformer_context + piece * positions_per_frame
    attention = codec.transformer_layers * 2 * positions * codec.dim
    edges = (positions_per_frame + 6) * codec.dim + 2 * codec.decoder_filters  # before SEANet, into it, out of it
    channels = codec.decoder_filters * 2 ** len(codec.ratios)
    for ratio in codec.ratios:
        channels //= 2
        edges += channels * (ratio + 2 * codec.residual_layers)  # overlap of the upsampling, past of the kernel of 3
    return 4 * (attention + edges)


def prefill_bytes(model: ModelConfig, engine: EngineConfig, precision: Precision) -> int:
    """The widest activations of one piece of a prompt, and its attention mask."""
    stack = model.backbone
    piece = min(engine.prefill_piece, model.max_seq_len)
    return piece * (4 * stack.ffn_dim + 6 * stack.dim) * precision.number + piece * stack.heads * model.max_seq_len


def _stack_weights(stack: StackConfig) -> int:
    attention = 2 * stack.dim * (stack.heads + stack.kv_heads) * stack.head_dim
    return stack.layers * (attention + 3 * stack.dim * stack.ffn_dim)


def _cache_numbers(stack: StackConfig, positions: int) -> int:
    return 2 * stack.layers * stack.kv_heads * stack.head_dim * positions
