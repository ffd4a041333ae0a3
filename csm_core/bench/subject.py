"""What is measured: a model with its codec, from a checkpoint or with random weights of a known size, and prompts.

Random weights cost the same time as trained ones and need no download; nobody would want to hear them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csm_core.codec import Codec, build_mimi
from csm_core.config import CSM_1B, MIMI, CodecConfig, ModelConfig, Profile, Quantization, Settings, StackConfig
from csm_core.device import pick_device
from csm_core.engine.engine import Engine
from csm_core.engine.memory import Precision, weight_bytes
from csm_core.engine.request import SamplingParams
from csm_core.errors import InvalidInputError
from csm_core.loading import is_large, read_parts, reading_dtype, set_threads
from csm_core.model.checkpoint import find_checkpoint, load_codec_state, load_model
from csm_core.model.csm import CSM
from csm_core.model.quantize import choose, quantize
from csm_core.prompt import EncodedSegment, build_prompt
from csm_core.text import TextTokenizer

_TINY = StackConfig(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=64)
_SMALL = StackConfig(layers=4, dim=256, heads=4, kv_heads=2, head_dim=64, ffn_dim=768)

# Name -> language model and codec. The two small ones are for trying the command out: seconds instead of minutes.
PRESETS: Mapping[str, tuple[ModelConfig, CodecConfig]] = {
    "csm-1b": (CSM_1B, MIMI),
    "small": (
        replace(
            CSM_1B,
            backbone=_SMALL,
            depth=replace(_SMALL, layers=2),
            num_codebooks=8,
            codebook_size=256,
            audio_vocab_size=256,
            text_vocab_size=512,
            max_seq_len=1024,
            bos_id=0,
            eos_id=1,
        ),
        replace(
            MIMI,
            dim=128,
            decoder_filters=16,
            encoder_filters=16,
            transformer_layers=2,
            transformer_heads=4,
            transformer_ffn_dim=256,
            total_codebooks=8,
            num_codebooks=8,
            codebook_size=256,
            codebook_dim=32,
        ),
    ),
    "tiny": (
        replace(
            CSM_1B,
            backbone=_TINY,
            depth=_TINY,
            num_codebooks=3,
            codebook_size=64,
            audio_vocab_size=64,
            text_vocab_size=64,
            max_seq_len=512,
            bos_id=0,
            eos_id=1,
        ),
        replace(
            MIMI,
            dim=16,
            decoder_filters=2,
            encoder_filters=2,
            transformer_layers=1,
            transformer_heads=2,
            transformer_ffn_dim=32,
            transformer_context=12,
            total_codebooks=3,
            num_codebooks=3,
            codebook_size=64,
            codebook_dim=8,
        ),
    ),
}
BLOCK = 4_194_301  # values that random weights repeat; a prime, so that no two rows of a matrix are alike
TEXT_TOKENS = 40  # of every prompt: a sentence of about ten seconds
NEVER = 10**6  # a repeat limit, or a chunk, that is not reached


@dataclass(frozen=True, eq=False)
class Subject:
    """One model ready to be measured. ``tokenizer`` is None for random weights, which have nothing to say."""

    name: str
    model: CSM
    codec: Codec
    settings: Settings
    profile: Profile
    codec_bytes: int  # of both halves of the codec
    quantization: Quantization | None = None  # done by ``quantize``, not before: peers take the weights as they are
    tokenizer: TextTokenizer | None = None

    @property
    def frame_seconds(self) -> float:
        return 1 / self.codec.config.frame_rate

    @property
    def dtype(self) -> torch.dtype:
        return self.model.text_embedding.weight.dtype

    @property
    def parameters(self) -> int:
        """Weights of the language model, however they are packed."""
        return weight_bytes(self.model.config, Precision(1))

    @property
    def precision(self) -> Precision:
        """Bytes of its numbers."""
        return Precision(self.dtype.itemsize, self.quantization)

    @property
    def weights(self) -> str:
        """How they are kept, in a word or two."""
        plain = str(self.dtype).removeprefix("torch.")
        return f"{self.quantization} ({plain})" if self.quantization else plain

    def quantize(self) -> None:
        """Pack the weights as the settings say, for good."""
        if self.quantization:
            quantize(self.model, self.quantization)

    @contextmanager
    def engine(self, **overrides: object) -> Iterator[Engine]:
        """An engine with the settings under test, changed by ``overrides`` (fields of EngineConfig), while it is used.

        It does not end a speech for repeating itself: what is measured must have the length that was asked for.
        """
        config = replace(self.settings.engine, repeat_limit=NEVER, **overrides)  # type: ignore[arg-type]
        engine = Engine(self.model, self.codec, config)
        try:
            yield engine
        finally:
            engine.close()

    def prompt(self, number: int, voice_frames: int = 0, voice: int = 0, text_tokens: int = TEXT_TOKENS) -> Tensor:
        """A random text to speak, another for each ``number``, after ``voice_frames`` of audio of voice ``voice``."""
        config = self.model.config
        segments = []
        if voice_frames:
            random = torch.Generator().manual_seed(1_000_003 * (voice + 1))
            codes = torch.randint(1, config.codebook_size, (voice_frames, config.num_codebooks), generator=random)
            segments.append(EncodedSegment(self._text(random, text_tokens), codes, 0, is_voice=True))
        random = torch.Generator().manual_seed(number)
        return build_prompt(segments, self._text(random, text_tokens), config.num_codebooks)

    def _text(self, random: torch.Generator, tokens: int) -> list[int]:
        """Ordinary ids only: the ends of a vocabulary are special, here or in a peer."""
        config = self.model.config
        ids = torch.randint(2, min(config.text_vocab_size - 4, config.bos_id or 2**31), (tokens - 2,), generator=random)
        return [config.bos_id, *ids.tolist(), config.eos_id]

    def params(self, frames: int, seed: int = 0, temperature: float | None = None) -> SamplingParams:
        """Sampling as the checkpoint wants it, for a speech of exactly ``frames`` frames: its end is banned."""
        heat = self.profile.temperature if temperature is None else temperature
        return SamplingParams(heat, self.profile.top_k, seed, frames, min_frames=frames)


@dataclass(frozen=True)
class Source:
    """Where a subject comes from: ``model`` as ``load`` knows it, or the name of a size in ``random_weights``."""

    model: str = "auto"
    random_weights: str | None = None
    device: str | None = None
    dtype: torch.dtype | None = None

    def build(self, settings: Settings) -> Subject:
        """What ``load`` would build, not quantised yet. Raises InvalidInputError, and what ``load`` raises."""
        place = pick_device(self.device or settings.device)
        if self.dtype is not None and settings.quantize is None:
            settings = replace(settings, quantize="off")
        if self.random_weights is not None:
            subject = self._random(self.random_weights, place, settings)
        else:
            subject = self._checkpoint(place, settings)
        set_threads(subject.model.config, place)
        return subject

    def _random(self, size: str, place: torch.device, settings: Settings) -> Subject:
        if size not in PRESETS:
            raise InvalidInputError(f"There is no size {size!r:.40}; known: {', '.join(PRESETS)}.", "random-weights")
        shape, codec_shape = PRESETS[size]
        profile = Profile(f"random {size}")
        quantization = choose(settings.quantize, profile, place, is_large(shape))
        state = _random_codec_state(codec_shape)
        model = _random_model(shape, place, self._dtype(quantization, place))
        codec = Codec(codec_shape, state, place)
        return Subject(profile.name, model, codec, settings, profile, _nbytes(state), quantization)

    def _checkpoint(self, place: torch.device, settings: Settings) -> Subject:
        checkpoint = find_checkpoint(self.model, place)
        parts = read_parts(checkpoint)
        profile = parts.profile
        quantization = choose(settings.quantize, profile, place, is_large(checkpoint.config))
        state = load_codec_state(checkpoint)
        codec = Codec(parts.codec, state, place)
        model = load_model(checkpoint, place, self._dtype(quantization, place))
        return Subject(profile.name, model, codec, settings, profile, _nbytes(state), quantization, parts.tokenizer)

    def _dtype(self, quantization: Quantization | None, place: torch.device) -> torch.dtype:
        return self.dtype or reading_dtype(quantization, place)


def _nbytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def _random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> CSM:
    """Weights of std 0.02, norms 1. Every value is one of bf16: a bf16 and an fp32 model of one size are the same."""
    with torch.device("meta"):
        model = CSM(config)
    random = torch.Generator().manual_seed(0)
    # One block, repeated: 1.5 billion random numbers take a minute of one core, copying them seconds.
    block = (0.02 * torch.randn(BLOCK, generator=random)).to(torch.bfloat16).to(device, dtype)
    weights, used = {}, 0
    for name, empty in model.state_dict().items():
        count = empty.numel()
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(empty.shape, dtype=dtype, device=device)
            continue
        flat = torch.empty(count, dtype=dtype, device=device)
        filled = 0
        while filled < count:
            piece = block[used : used + count - filled]
            flat[filled : filled + len(piece)] = piece
            filled += len(piece)
            used = (used + len(piece)) % BLOCK
        weights[name] = flat.view(empty.shape)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def _random_codec_state(config: CodecConfig) -> dict[str, Tensor]:
    """moshi's fresh weights; its fresh codebooks are all zero, and zeros may take another time to compute with."""
    torch.manual_seed(0)
    state = build_mimi(config).state_dict()
    for name, value in state.items():
        if name.endswith("embedding_sum"):
            value.normal_()
    return dict(state)
