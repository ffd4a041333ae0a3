"""Every setting of the package as frozen values, and the one place that reads the environment.

Shapes and sizes only: this module knows neither torch nor files.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StackConfig:
    """One Llama-style transformer stack. ``head_dim`` is per attention head."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 rotary scaling (Llama 3.1 model card; ``original_len`` is the pre-training length)."""

    factor: float = 32.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a CSM: a backbone over frames, a depth decoder over the codebooks of one frame.

    ``audio_vocab_size`` counts the entries of one codebook's embedding and head; only ``codebook_size`` of them are
    codes of the codec, the rest are never sampled.
    """

    backbone: StackConfig
    depth: StackConfig
    num_codebooks: int
    codebook_size: int
    audio_vocab_size: int
    text_vocab_size: int
    max_seq_len: int
    bos_id: int
    eos_id: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ModelConfig":
        """Read what ``to_dict`` wrote. Unknown keys raise TypeError."""
        fields = dict(values)
        fields["backbone"] = StackConfig(**fields["backbone"])
        fields["depth"] = StackConfig(**fields["depth"])
        scaling = fields.get("rope_scaling")
        fields["rope_scaling"] = RopeScaling(**scaling) if scaling is not None else None
        return ModelConfig(**fields)


CSM_1B = ModelConfig(
    backbone=StackConfig(layers=16, dim=2048, heads=32, kv_heads=8, head_dim=64, ffn_dim=8192),
    depth=StackConfig(layers=4, dim=1024, heads=8, kv_heads=2, head_dim=128, ffn_dim=8192),
    num_codebooks=32,
    codebook_size=2048,
    audio_vocab_size=2051,
    text_vocab_size=128_256,
    max_seq_len=2048,
    bos_id=128_000,
    eos_id=128_001,
)


@dataclass(frozen=True)
class CodecConfig:
    """The shape of a Mimi codec (SEANet + transformers + split RVQ). The defaults are those of the published one.

    ``encoder_filters`` and ``decoder_filters`` are the channels nearest the waveform. The transformers run at
    ``sample_rate / prod(ratios)`` positions a second, ``transformer_context`` counts those. ``num_codebooks`` of
    ``total_codebooks`` are used. ``channel_wise_upsample``: the published weights upsample each channel alone.
    """

    sample_rate: int = 24_000
    frame_rate: float = 12.5
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    dim: int = 512
    encoder_filters: int = 64
    decoder_filters: int = 64
    residual_layers: int = 1
    transformer_layers: int = 8
    transformer_heads: int = 8
    transformer_ffn_dim: int = 2048
    transformer_context: int = 250
    layer_scale: float = 0.01
    channel_wise_upsample: bool = True
    total_codebooks: int = 32
    num_codebooks: int = 32
    codebook_size: int = 2048
    codebook_dim: int = 256

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return round(self.sample_rate / self.frame_rate)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": list(self.ratios)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "CodecConfig":
        """Read what ``to_dict`` wrote. Unknown keys raise TypeError."""
        return CodecConfig(**{**values, "ratios": tuple(values["ratios"])})


MIMI = CodecConfig()

BUNDLED_CODEC = CodecConfig(
    dim=128,
    encoder_filters=16,
    decoder_filters=24,
    transformer_layers=2,
    transformer_heads=4,
    transformer_ffn_dim=512,
    transformer_context=26,  # what the training crops hold: no position that was not learnt
    layer_scale=0.1,
    channel_wise_upsample=False,
    total_codebooks=6,
    num_codebooks=6,
    codebook_size=512,
    codebook_dim=64,
)


@dataclass(frozen=True)
class Profile:
    """How a checkpoint wants to be used: its name, and the ``defaults`` of its config.json.

    ``max_chars`` is the longest sentence it was made for, ``spell_out`` that it reads no digits, ``speakers`` whom it
    knows (None: any).
    """

    name: str
    temperature: float = 0.9
    top_k: int = 50
    max_chars: int = 240
    spell_out: bool = False
    speakers: tuple[int, ...] | None = None

    @staticmethod
    def from_defaults(name: str, defaults: Mapping[str, Any]) -> "Profile":
        """Unknown keys raise TypeError."""
        speakers = defaults.get("speakers")
        return Profile(name, **{**defaults, "speakers": None if speakers is None else tuple(speakers)})


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. ``chunk_schedule``: frames in the 1st, 2nd, ... chunk of a take; the last entry repeats."""

    slots: int = 1
    queue_size: int = 64  # requests that may wait for a slot; the next one is refused
    chunk_schedule: tuple[int, ...] = (1, 2, 4, 8)
    repeat_limit: int = 25  # 2 s of one and the same frame: the model is stuck

    def __post_init__(self) -> None:
        if self.slots < 1 or self.queue_size < 0 or self.repeat_limit < 2:
            raise ValueError("EngineConfig needs slots >= 1, queue_size >= 0 and repeat_limit >= 2")
        if not self.chunk_schedule or min(self.chunk_schedule) < 1:
            raise ValueError("chunk_schedule needs at least one entry, each at least 1")


@dataclass(frozen=True)
class SilenceConfig:
    """What counts as silence and what follows from it. Levels are RMS per window, in dB against full scale (dBFS).

    The bundled voice speaks at -10 to -30 dBFS and pauses at -60 to -70.
    """

    threshold_dbfs: float = -50.0
    window_ms: int = 20
    onset_ms: int = 60  # loud for that long is speech; anything shorter is a click
    keep_lead_ms: int = 100  # silence left before the first speech
    max_lead_ms: int = 2500  # a take that is silent for that long has failed
    keep_tail_ms: int = 500  # a pause up to here is passed on at once, the rest only if speech follows
    max_pause_ms: int = 2500  # a pause that long is the end
    max_takes: int = 3
    temperature_step: float = 0.2  # each further take is that much cooler ...
    min_temperature: float = 0.3  # ... down to here, and never hotter than the caller asked
    min_top_k: int = 5  # each further take halves top-k down to here

    def __post_init__(self) -> None:
        if self.window_ms < 1 or 80 % self.window_ms or self.max_takes < 1:
            raise ValueError("SilenceConfig needs a window_ms that divides the 80 ms of a frame, and max_takes >= 1")


@dataclass(frozen=True)
class Settings:
    """What an entry point needs to start. ``model``: "auto", "bundled", a folder or a hub id."""

    model: str = "auto"
    device: str | None = None
    voices: Path | None = None
    log_level: str = "INFO"
    engine: EngineConfig = field(default_factory=EngineConfig)
    silence: SilenceConfig = field(default_factory=SilenceConfig)

    @staticmethod
    def from_env(environ: Mapping[str, str] | None = None) -> "Settings":
        """Read CSM_MODEL, CSM_DEVICE, CSM_VOICES and CSM_LOG_LEVEL; what is unset or empty keeps its default.

        HF_TOKEN, HF_HOME and HF_HUB_ENABLE_HF_TRANSFER are read by huggingface_hub itself. Raises ValueError.
        """
        environ = os.environ if environ is None else environ
        log_level = (environ.get("CSM_LOG_LEVEL") or Settings.log_level).upper()
        if log_level not in logging.getLevelNamesMapping():
            raise ValueError(f"CSM_LOG_LEVEL is {log_level}; logging knows DEBUG, INFO, WARNING, ERROR and CRITICAL.")
        voices = environ.get("CSM_VOICES")
        return Settings(
            model=environ.get("CSM_MODEL") or Settings.model,
            device=environ.get("CSM_DEVICE") or None,
            voices=Path(voices) if voices else None,
            log_level=log_level,
        )
