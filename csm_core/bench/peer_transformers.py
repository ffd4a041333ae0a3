"""Transformers' CSM as a peer: its own ``generate`` over the subject's weights. Imported only when it is asked for.

In bf16, the faster of its modes on every machine seen, unless the subject is fp32 and small enough to be compared
code by code.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.csm.modeling_csm import CsmRotaryEmbedding

from csm_core.bench.subject import Subject
from csm_core.config import ModelConfig, StackConfig
from csm_core.model.layouts import lm_names

EXACT = 50_000_000  # parameters: below that the peer keeps the subject's type


class TransformersPeer:
    """``CsmForConditionalGeneration`` with the subject's weights; its codec is a stub that is never called."""

    version = transformers.__version__

    def __init__(self, subject: Subject) -> None:
        config = subject.model.config
        weights = subject.model.state_dict()
        small = sum(weight.numel() for weight in weights.values()) < EXACT
        self.dtype = subject.dtype if small else torch.bfloat16
        with torch.device("meta"):
            self._model = transformers.CsmForConditionalGeneration(_config(config))
        names = lm_names("transformers", config)
        named = {theirs: weights[native].to(self.dtype) for theirs, native in names.items()}
        self._model.load_state_dict(named, strict=False, assign=True)
        self._device = subject.codec.device
        self._temperature, self._top_k = subject.profile.temperature, subject.profile.top_k
        self._finish(config)

    def _finish(self, config: ModelConfig) -> None:
        """What it computes at construction is still on the meta device, the codec included."""
        for stack in (self._model.backbone_model, self._model.depth_decoder.model):
            stack.rotary_emb = CsmRotaryEmbedding(stack.config).to(self._device)
        offsets = torch.arange(config.num_codebooks, device=self._device) * config.audio_vocab_size
        self._model.backbone_model.embed_tokens.register_buffer("audio_tokens_offsets", offsets, persistent=False)
        self._model.codec_model = transformers.MimiModel(self._model.config.codec_config).to(self._device)
        self._model.eval()

    @torch.inference_mode()
    def frames(self, text_ids: Sequence[int], count: int, greedy: bool = False) -> Tensor:
        """Its ``generate``, as its documentation calls it, with the subject's temperature and top-k."""
        ids = torch.tensor([list(text_ids)], device=self._device)
        sampling: dict[str, Any] = {"do_sample": False, "depth_decoder_do_sample": False}
        if not greedy and self._temperature > 0:
            drawn = {"do_sample": True, "temperature": self._temperature, "top_k": self._top_k}
            sampling = drawn | {f"depth_decoder_{key}": value for key, value in drawn.items()}
        codes = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, output_audio=False, **sampling
        )
        found: Tensor = codes[0].cpu()
        return found


def build(subject: Subject) -> TransformersPeer:
    transformers.utils.logging.set_verbosity_error()
    return TransformersPeer(subject)


def _config(config: ModelConfig) -> Any:
    depth = transformers.CsmDepthDecoderConfig(
        num_codebooks=config.num_codebooks,
        backbone_hidden_size=config.backbone.dim,
        vocab_size=config.audio_vocab_size,
        max_position_embeddings=config.num_codebooks + 1,
        **_stack(config.depth, config, config.num_codebooks + 1),
    )
    stub = transformers.MimiConfig(
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=config.codebook_size,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=config.num_codebooks,
        upsample_groups=16,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    special = config.text_vocab_size - 1  # placeholders; a prompt of this package has ids below the last four only
    return transformers.CsmConfig(
        num_codebooks=config.num_codebooks,
        vocab_size=config.audio_vocab_size,
        text_vocab_size=config.text_vocab_size,
        max_position_embeddings=config.max_seq_len,
        bos_token_id=config.bos_id,
        pad_token_id=special,
        audio_token_id=special - 1,
        audio_eos_token_id=special - 2,
        codebook_pad_token_id=config.audio_vocab_size - 1,
        depth_decoder_config=depth,
        codec_config=stub,
        **_stack(config.backbone, config, config.max_seq_len),
    )


def _stack(stack: StackConfig, config: ModelConfig, positions: int) -> dict[str, Any]:
    rope: dict[str, Any] | None = None
    if (scaling := config.rope_scaling) is not None:
        # Only the ratios of the three lengths count, and Transformers wants the first below the model's own.
        original = positions // 2
        share = original / scaling.original_len
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor * share,
            "high_freq_factor": scaling.high_freq_factor * share,
            "original_max_position_embeddings": original,
        }
    return {
        "hidden_size": stack.dim,
        "intermediate_size": stack.ffn_dim,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
    }
