"""Every setting of the package as frozen values, and the one place that reads the environment.

Shapes and sizes only: this module knows neither torch nor files.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIN_KEY_LENGTH = 16  # characters of an API key


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
class Quantization:
    """Which weights are kept in fewer bytes: ``mode`` int8, int4, fp8, fp16 or bf16; ``part`` all, or depth alone."""

    mode: str
    part: str = "all"

    def __post_init__(self) -> None:
        if self.mode not in {"int8", "int4", "fp8", "fp16", "bf16"} or self.part not in {"all", "depth"}:
            raise ValueError(f"A quantisation is int8, int4, fp8, fp16 or bf16, or one with :depth, not {self}.")

    def __str__(self) -> str:
        return self.mode if self.part == "all" else f"{self.mode}:{self.part}"

    @staticmethod
    def parse(text: str) -> "Quantization":
        """Read "int8" or "int8:depth". Raises ValueError."""
        mode, colon, part = text.partition(":")
        return Quantization(mode, part if colon else "all")


@dataclass(frozen=True)
class Profile:
    """How a checkpoint wants to be used: its name, and the ``defaults`` of its config.json.

    ``max_chars`` is the longest sentence it was made for, ``spell_out`` that it reads no digits, ``speakers`` whom it
    knows (None: any), ``quantize`` the quantisations that its voice was judged to survive (None: not judged, all).
    """

    name: str
    temperature: float = 0.9
    top_k: int = 50
    max_chars: int = 240
    spell_out: bool = False
    speakers: tuple[int, ...] | None = None
    quantize: tuple[str, ...] | None = None

    def allows(self, quantization: Quantization) -> bool:
        """Whether its voice survives that. A mode that may take all of the weights may take the depth decoder's."""
        return self.quantize is None or not {str(quantization), quantization.mode}.isdisjoint(self.quantize)

    @staticmethod
    def from_defaults(name: str, defaults: Mapping[str, Any]) -> "Profile":
        """Unknown keys raise TypeError."""
        lists = {key: tuple(defaults[key]) for key in ("speakers", "quantize") if defaults.get(key) is not None}
        return Profile(name, **{**defaults, **lists})


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. ``chunk_schedule``: frames in the 1st, 2nd, ... chunk of a take; the last entry repeats."""

    slots: int = 1
    queue_size: int = 64  # requests that may wait for a slot; the next one is refused
    chunk_schedule: tuple[int, ...] = (1, 2, 4, 8)
    repeat_limit: int = 25  # 2 s of one and the same frame: the model is stuck
    prefill_piece: int = 128  # positions of a prompt that are read at once, between two frames of those who speak
    prefix_cache_bytes: int = 256 * 2**20  # for what was read of voices and contexts; 0: every prompt is read anew
    lookahead: int | None = None  # 1: launch a step before the codes of the last one are read; None: on CUDA only
    batch_buckets: bool = True  # a step computes the first 1, 2, 4, 8 ... rows; False: exactly those that speak
    graphs: bool | None = None  # a frame is recorded once per shape and replayed with one launch; None: on CUDA
    compile: bool = False  # torch.compile what a frame consists of
    fast_codec: bool = True  # our own streaming decoder; False: moshi's modules, which cost several times as much

    def __post_init__(self) -> None:
        if self.slots < 1 or self.queue_size < 0 or self.repeat_limit < 2:
            raise ValueError("EngineConfig needs slots >= 1, queue_size >= 0 and repeat_limit >= 2")
        if self.prefill_piece < 1 or self.prefix_cache_bytes < 0 or self.lookahead not in {None, 0, 1}:
            raise ValueError(
                "EngineConfig needs prefill_piece >= 1, prefix_cache_bytes >= 0 and lookahead 0, 1 or None"
            )
        if (self.graphs or self.compile) and not self.batch_buckets:
            raise ValueError("graphs and compile need batch_buckets: else there is a shape for every set of rows")
        if not self.chunk_schedule or min(self.chunk_schedule) < 1:
            raise ValueError("chunk_schedule needs at least one entry, each at least 1")

    def bucket(self, rows: int) -> int:
        """How many rows a step computes to cover the first ``rows``: the next power of two, or all slots."""
        return min(1 << (rows - 1).bit_length(), self.slots)


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
    min_temperature: float = 0.3  # ... down to here; one asked for below it is repeated here, or it would come again
    min_top_k: int = 5  # each further take halves top-k down to here

    def __post_init__(self) -> None:
        if self.window_ms < 1 or 80 % self.window_ms or self.max_takes < 1:
            raise ValueError("SilenceConfig needs a window_ms that divides the 80 ms of a frame, and max_takes >= 1")
        if not self.min_temperature > 0 or self.min_top_k < 2:
            raise ValueError("SilenceConfig needs min_temperature > 0 and min_top_k >= 2, or a take is its repetition")


@dataclass(frozen=True)
class Settings:
    """What an entry point needs to start. ``model``: "auto", "bundled", a folder or a hub id.

    ``quantize``: what ``Quantization.parse`` reads; "off": the weights as they are; None: what suits the device.
    """

    model: str = "auto"
    device: str | None = None
    voices: Path | None = None
    log_level: str = "INFO"
    engine: EngineConfig = field(default_factory=EngineConfig)
    silence: SilenceConfig = field(default_factory=SilenceConfig)
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.quantize not in {None, "off"}:
            Quantization.parse(str(self.quantize))

    @staticmethod
    def from_env(environ: Mapping[str, str] | None = None) -> "Settings":
        """Read CSM_MODEL, CSM_DEVICE, CSM_VOICES, CSM_LOG_LEVEL, CSM_QUANTIZE; what is unset or empty has its default.

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
            quantize=environ.get("CSM_QUANTIZE") or None,
        )


@dataclass(frozen=True)
class ServerSettings:
    """How the HTTP server behaves. Times are seconds; ``keys`` are SHA-256 digests in hex, one per accepted key.

    Without keys every route but the public ones answers 401, unless ``no_auth``.
    """

    keys: tuple[str, ...] = ()
    no_auth: bool = False
    public_lists: bool = False  # voices and models may be listed without a key: Open WebUI sends none there
    public_metrics: bool = False
    voices: Path | None = None
    max_speeches: int = 65  # that run or wait, one thread each; the next is refused. EngineConfig's slots + queue_size
    key_speeches: int | None = None  # the same for one key
    key_rate: str | None = None  # requests of one key, as "60/minute"
    max_body_bytes: int = 32 * 2**20  # some minutes of WAV in base64
    max_text: int = 4096  # characters, OpenAI's limit
    body_timeout: float = 30.0  # for a whole body to arrive
    request_timeout: float = 570.0  # for a whole speech, waiting included; clients of OpenAI's give up after 600
    write_timeout: float = 60.0  # a client that takes nothing for so long is cut off
    drain_timeout: float = 90.0  # after SIGTERM, for speeches that have begun
    cors_origins: tuple[str, ...] = ()

    @staticmethod
    def from_env(environ: Mapping[str, str] | None = None) -> "ServerSettings":
        """Read CSM_API_KEYS (keys, or sha256:<hex digest>, separated by commas or blanks) and CSM_VOICES.

        Raises ValueError for a key that is too easy to guess.
        """
        environ = os.environ if environ is None else environ
        keys = (environ.get("CSM_API_KEYS") or "").replace(",", " ").split()
        voices = environ.get("CSM_VOICES")
        return ServerSettings(keys=tuple(map(key_digest, keys)), voices=Path(voices) if voices else None)


def key_digest(key: str) -> str:
    """SHA-256 in hex of an API key, or the digest itself when written as ``sha256:<hex>``. Raises ValueError."""
    if re.fullmatch(r"sha256:[0-9a-fA-F]{64}", key):
        return key.removeprefix("sha256:").lower()
    if len(key) < MIN_KEY_LENGTH:
        raise ValueError(f"An API key has {MIN_KEY_LENGTH} characters at least: take `openssl rand -hex 24`.")
    return hashlib.sha256(key.encode()).hexdigest()
