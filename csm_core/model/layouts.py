"""The published layouts of CSM as tables: tensor names, order of the rotary pairs, and configuration keys.

Names, tensors and parsed JSON go in, their native form comes out. Knows no files, no network and no network classes.
Sources: the key lists of sesame/csm-1b (torchtune names), of Transformers' CsmForConditionalGeneration and of its
MimiModel, and moshi's MimiModel.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from csm_core.config import CSM_1B, MIMI, CodecConfig, ModelConfig, RopeScaling, StackConfig
from csm_core.errors import CheckpointError

Layout = Literal["native", "transformers", "original"]

CODEC_PREFIXES = ("codec.", "codec_model.")  # native, Transformers; the original has its codec in a file of its own

_MARKS: dict[str, Layout] = {
    "text_embedding.weight": "native",
    "embed_text_tokens.weight": "transformers",
    "text_embeddings.weight": "original",
}
_MIMI_MARK = "quantizer.rvq_first."

# native, Transformers, original
_STACKS = (("backbone", "backbone_model", "backbone"), ("depth", "depth_decoder.model", "decoder"))
_PER_LAYER = (
    ("attn_norm.weight", "input_layernorm.weight", "sa_norm.scale"),
    ("attn.q_proj.weight", "self_attn.q_proj.weight", "attn.q_proj.weight"),
    ("attn.k_proj.weight", "self_attn.k_proj.weight", "attn.k_proj.weight"),
    ("attn.v_proj.weight", "self_attn.v_proj.weight", "attn.v_proj.weight"),
    ("attn.o_proj.weight", "self_attn.o_proj.weight", "attn.output_proj.weight"),
    ("mlp_norm.weight", "post_attention_layernorm.weight", "mlp_norm.scale"),
    ("mlp.gate_proj.weight", "mlp.gate_proj.weight", "mlp.w1.weight"),
    ("mlp.down_proj.weight", "mlp.down_proj.weight", "mlp.w2.weight"),
    ("mlp.up_proj.weight", "mlp.up_proj.weight", "mlp.w3.weight"),
)
_PER_STACK = (("norm.weight", "norm.weight", "norm.scale"),)
_SINGLE = (
    ("text_embedding.weight", "embed_text_tokens.weight", "text_embeddings.weight"),
    # Tied in Transformers, whose files hold the one name, the other or both.
    ("audio_embedding.weight", "depth_decoder.model.embed_tokens.weight", "audio_embeddings.weight"),
    ("audio_embedding.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight", "audio_embeddings.weight"),
    ("projection.weight", "depth_decoder.model.inputs_embeds_projector.weight", "projection.weight"),
    ("codebook0_head.weight", "lm_head.weight", "codebook0_head.weight"),
    ("audio_head", "depth_decoder.codebooks_head.weight", "audio_head"),
)

# Transformers' MimiModel -> moshi's, in this order
_MIMI_FROM_TRANSFORMERS = (
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
    (r"^((?:encoder|decoder)\.model\.\d+(?:\.block\.\d+)?)\.conv\.", r"\1.conv.conv."),
    (r"^downsample\.conv\.", "downsample.conv.conv.conv."),
    (r"^upsample\.conv\.", "upsample.convtr.convtr.convtr."),
    (r"_transformer\.layers\.", "_transformer.transformer.layers."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
    (r"\.self_attn_layer_scale\.", ".layer_scale_1."),
    (r"\.mlp_layer_scale\.", ".layer_scale_2."),
    (r"\.self_attn\.q_proj\.", ".self_attn.in_projs.0."),  # with key and value, see codec_to_native
    (r"\.self_attn\.o_proj\.", ".self_attn.out_projs.0."),
    (r"\.semantic_residual_vector_quantizer\.", ".rvq_first."),
    (r"\.acoustic_residual_vector_quantizer\.", ".rvq_rest."),
    (r"(\.rvq_\w+)\.layers\.(\d+)\.codebook\.", r"\1.vq.layers.\2._codebook."),
    (r"\._codebook\.initialized$", "._codebook._initialized"),
    (r"\._codebook\.embed_sum$", "._codebook.embedding_sum"),
)
# names that moshi's own files had before 0.2 -> today's
_MIMI_FROM_OLDER = (
    (r"\.self_attn\.in_proj(_|\.)weight$", ".self_attn.in_projs.0.weight"),
    (r"\.self_attn\.out_proj\.weight$", ".self_attn.out_projs.0.weight"),
    (r"\._codebook\.inited$", "._codebook._initialized"),
    (r"\._codebook\.cluster_size$", "._codebook.cluster_usage"),
    (r"\._codebook\.embed_(avg|sum)$", "._codebook.embedding_sum"),
)


def layout_of(names: Iterable[str]) -> Layout | Literal["mimi"] | None:
    """Which layout a set of tensor names is; ``mimi`` is a codec alone in moshi's names; None is no CSM."""
    mimi = False
    for name in names:
        if name in _MARKS:
            return _MARKS[name]
        mimi = mimi or name.startswith(_MIMI_MARK)
    return "mimi" if mimi else None


def without_codec_prefix(name: str) -> str:
    for prefix in CODEC_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def lm_names(layout: Layout, config: ModelConfig) -> dict[str, str]:
    """Published name -> native name of every tensor of the language model. Two published names may share a native."""
    column = {"native": 0, "transformers": 1, "original": 2}[layout]
    names = {row[column]: row[0] for row in _SINGLE}
    for stack, shape in zip(_STACKS, (config.backbone, config.depth), strict=True):
        names |= {f"{stack[column]}.{row[column]}": f"{stack[0]}.{row[0]}" for row in _PER_STACK}
        for layer in range(shape.layers):
            here, native = f"{stack[column]}.layers.{layer}", f"{stack[0]}.layers.{layer}"
            names |= {f"{here}.{row[column]}": f"{native}.{row[0]}" for row in _PER_LAYER}
    return names


def split_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Interleaved -> half-split rotary: rows (0, 1), (2, 3) .. of a head become (0, D/2), (1, D/2 + 1) ..

    ``weight`` [heads * head_dim, dim] of a query or key projection. The rotation pairs row i of each head with i + 1
    in torchtune and moshi, with i + D/2 in Transformers and here.
    """
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def join_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Half-split -> interleaved rotary, the inverse of :func:`split_pairs`."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_native(layout: Layout, native: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The values of the native tensor ``native``, from the published ``tensor`` of the same shape."""
    if layout == "original" and native.endswith((".q_proj.weight", ".k_proj.weight")):
        stack = config.backbone if native.startswith("backbone.") else config.depth
        return split_pairs(tensor, stack.head_dim)
    return tensor


def codec_to_native(state: Mapping[str, Tensor], codec: Mapping[str, Any]) -> dict[str, Tensor]:
    """A codec's published tensors, prefix already cut off, under the names and in the order of moshi's MimiModel.

    Transformers keeps query, key and value apart and half-split; moshi has them in one matrix, interleaved. Raises
    CheckpointError when one of the three is missing.
    """
    if layout_of(state) == "mimi":
        return {_rename(name, _MIMI_FROM_OLDER): tensor for name, tensor in state.items()}
    step = codec["residual_layers"] + 2  # activation, transposed convolution, residual blocks
    upsampling = "|".join(str(2 + ratio * step) for ratio in range(len(codec["ratios"])))
    transposed = (rf"^decoder\.model\.({upsampling})\.conv\.conv\.", r"decoder.model.\1.convtr.convtr.")
    head_dim = codec["dim"] // codec["transformer_heads"]
    native: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            continue  # joined to their query
        renamed = _rename(name, (*_MIMI_FROM_TRANSFORMERS, transposed))
        native[renamed] = _joined(state, name, head_dim) if name.endswith(".q_proj.weight") else tensor
    return native


def _joined(state: Mapping[str, Tensor], query: str, head_dim: int) -> Tensor:
    names = [query.replace("q_proj", part) for part in ("k_proj", "v_proj")]
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(f"The codec lacks the tensor {missing[0]}.")
    key, value = (state[name] for name in names)
    return torch.cat((join_pairs(state[query], head_dim), join_pairs(key, head_dim), value))


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The language model's shape from a published ``config.json``, Transformers' or the original's.

    Transformers omits keys that have its default values, and those are CSM-1B's: what is absent is taken from there.
    Raises CheckpointError for what this network cannot be.
    """
    if "backbone_flavor" in raw:
        return _original_config(raw)
    if raw.get("model_type", "csm") != "csm":
        raise CheckpointError(f'config.json says model_type "{raw["model_type"]}", not "csm".')
    depth = raw.get("depth_decoder_config") or {}
    rope, eps = _rope(raw), _get(raw, "rms_norm_eps", CSM_1B.norm_eps)
    if (rope, eps) != (_rope(depth), _get(depth, "rms_norm_eps", CSM_1B.norm_eps)):
        raise CheckpointError("config.json gives backbone and depth decoder different rotary or norm settings.")
    text_vocab = _get(raw, "text_vocab_size", CSM_1B.text_vocab_size)
    # CSM's EOS ends a text; Transformers' eos_token_id would end generation and is left open in the published file.
    bos: int | None = CSM_1B.bos_id
    eos: int | None = CSM_1B.eos_id
    if text_vocab != CSM_1B.text_vocab_size:
        bos, eos = raw.get("bos_token_id"), raw.get("eos_token_id")
    if bos is None or eos is None:
        raise CheckpointError("config.json needs bos_token_id and eos_token_id for a vocabulary that is not CSM-1B's.")
    return ModelConfig(
        backbone=_stack(raw, CSM_1B.backbone),
        depth=_stack(depth, CSM_1B.depth),
        num_codebooks=_get(raw, "num_codebooks", CSM_1B.num_codebooks),
        codebook_size=_get(raw.get("codec_config") or {}, "codebook_size", CSM_1B.codebook_size),
        audio_vocab_size=_get(raw, "vocab_size", CSM_1B.audio_vocab_size),
        text_vocab_size=text_vocab,
        max_seq_len=_get(raw, "max_position_embeddings", CSM_1B.max_seq_len),
        bos_id=bos,
        eos_id=eos,
        rope_theta=rope[0],
        rope_scaling=rope[1],
        norm_eps=eps,
    )


def _original_config(raw: Mapping[str, Any]) -> ModelConfig:
    flavors = {"llama-1B": CSM_1B.backbone, "llama-100M": CSM_1B.depth}
    named = (str(raw["backbone_flavor"]), str(raw.get("decoder_flavor")))
    if not all(name in flavors for name in named):
        raise CheckpointError(f"config.json names the flavors {named[0]} and {named[1]}; known: {', '.join(flavors)}.")
    return replace(
        CSM_1B,
        backbone=flavors[named[0]],
        depth=flavors[named[1]],
        num_codebooks=raw["audio_num_codebooks"],
        audio_vocab_size=raw["audio_vocab_size"],
        text_vocab_size=raw["text_vocab_size"],
    )


def _get(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key that is absent or null is the default."""
    value = raw.get(key)
    return default if value is None else value


def _stack(raw: Mapping[str, Any], default: StackConfig) -> StackConfig:
    return StackConfig(
        layers=_get(raw, "num_hidden_layers", default.layers),
        dim=_get(raw, "hidden_size", default.dim),
        heads=_get(raw, "num_attention_heads", default.heads),
        kv_heads=_get(raw, "num_key_value_heads", default.kv_heads),
        head_dim=_get(raw, "head_dim", default.head_dim),
        ffn_dim=_get(raw, "intermediate_size", default.ffn_dim),
    )


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling; Transformers 4 writes rope_theta and rope_scaling, 5 one rope_parameters.

    Only ratios of the lengths in Llama's rule matter, and the published backbone (original length 1024, factors 0.125
    and 0.5) and depth decoder (16, 0.001953125, 0.0078125) each write 8192, 1, 4 in their own way: here the low
    factor becomes 1.
    """
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or _get(raw, "rope_theta", CSM_1B.rope_theta))
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f'config.json asks for "{kind}" rotary scaling; CSM has "llama3" or none.')
    low = scaling["low_freq_factor"]
    length = round(scaling["original_max_position_embeddings"] / low)
    return theta, RopeScaling(float(scaling["factor"]), 1.0, scaling["high_freq_factor"] / low, length)


def codec_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The codec's settings (``CodecConfig.to_dict``) from a published ``config.json``; Mimi's where it is silent."""
    codec = raw.get("codec_config") or {}
    sample_rate = _get(codec, "sampling_rate", MIMI.sample_rate)
    ratios = tuple(_get(codec, "upsampling_ratios", MIMI.ratios))
    dim = _get(codec, "hidden_size", MIMI.dim)
    filters = _get(codec, "num_filters", MIMI.encoder_filters)
    return CodecConfig(
        sample_rate=sample_rate,
        frame_rate=sample_rate / math.prod(ratios) / 2,  # a learnt halving follows the encoder
        ratios=ratios,
        dim=dim,
        encoder_filters=filters,
        decoder_filters=filters,
        residual_layers=_get(codec, "num_residual_layers", MIMI.residual_layers),
        transformer_layers=_get(codec, "num_hidden_layers", MIMI.transformer_layers),
        transformer_heads=_get(codec, "num_attention_heads", MIMI.transformer_heads),
        transformer_ffn_dim=_get(codec, "intermediate_size", MIMI.transformer_ffn_dim),
        transformer_context=_get(codec, "sliding_window", MIMI.transformer_context),
        layer_scale=_get(codec, "layer_scale_initial_scale", MIMI.layer_scale),
        channel_wise_upsample=_get(codec, "upsample_groups", dim) == dim,
        total_codebooks=_get(codec, "num_quantizers", MIMI.total_codebooks),
        num_codebooks=_get(raw, "num_codebooks", raw.get("audio_num_codebooks", MIMI.num_codebooks)),
        codebook_size=_get(codec, "codebook_size", MIMI.codebook_size),
        codebook_dim=_get(codec, "codebook_dim", MIMI.codebook_dim),
    ).to_dict()
