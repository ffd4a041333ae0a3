"""The generator: text, earlier turns and a voice in, speech out. The product; every entry point is a user of it.

Plans what is spoken (sentences, context, prompt, length) and leaves speaking to takes.py and the engine. Knows no HTTP,
no file format and no command line.
"""

import logging
import math
import secrets
import time
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from csm_core.codec import Codec
from csm_core.config import Profile, Quantization, Settings
from csm_core.device import free_memory, pick_device
from csm_core.engine.engine import Engine
from csm_core.engine.memory import Precision, Shapes, check_fits
from csm_core.engine.request import FinishReason
from csm_core.errors import InvalidInputError
from csm_core.loading import is_large, plain_dtype, read_parts, reading_dtype, set_threads
from csm_core.model.checkpoint import find_checkpoint, load_codec_state, load_model
from csm_core.model.csm import CSM
from csm_core.model.quantize import choose, layers_for, quantize
from csm_core.prompt import EncodedSegment, Segment, Turn, build_prompt, fit_context, segment_length
from csm_core.silence import Take, derive_seed
from csm_core.spelling import spell_out
from csm_core.takes import Account, Sentence, Speech, SpeechStream, speak_sentence
from csm_core.text import TextTokenizer, check_speaker, clean, split_sentences
from csm_core.voices import CodesCache, Voice, VoiceCache

logger = logging.getLogger(__name__)

# The frame cap is a backstop against a model that does not end, not an estimate: English is read at about 15 characters
# a second, 0.067 s each. A digit may be a word of its own, other scripts put a syllable or more into one character.
CAP_SECONDS = 3.0
CAP_SECONDS_PER_CHARACTER = 0.15
CAP_SECONDS_PER_DIGIT = 0.8
CAP_SECONDS_PER_OTHER_LETTER = 0.5

MIN_REST = 12  # frames, 1 s: with less left of max_audio_length_ms a further sentence is not begun


@dataclass(frozen=True, eq=False)
class _Line:
    """A sentence to speak."""

    text_ids: list[int]
    max_frames: int


@dataclass(frozen=True, eq=False)
class _Heard:
    """An earlier turn or a voice's sample, its audio not encoded yet: most of it may not fit into the prompt."""

    text_ids: list[int]
    segment: Segment
    turn: Turn


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the checked parameters of ``generate`` come down to."""

    lines: list[_Line]
    speaker: int
    heard: list[_Heard]
    max_frames: float  # of the whole speech; infinite when the caller set no limit
    temperature: float
    top_k: int
    seed: int


class Generator:
    """Speech from one model. Any number of threads may call it; what exceeds the engine's slots waits its turn."""

    def __init__(
        self, model: CSM, codec: Codec, tokenizer: TextTokenizer, profile: Profile, settings: Settings | None = None
    ) -> None:
        self._settings = settings or Settings()
        self.codec = codec
        self._tokenizer = tokenizer
        self._profile = profile
        self._config = model.config
        self._cache = CodesCache()
        self._voices = VoiceCache(codec.sample_rate)
        self._engine = Engine(model, codec, self._settings.engine)

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    @property
    def model_name(self) -> str:
        return self._profile.name

    @property
    def device(self) -> str:
        return str(self.codec.device)

    @property
    def alive(self) -> bool:
        """False once it was closed or its engine broke down."""
        return self._engine.alive

    def generate(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Path | Voice | None = None,
        timeout: float | None = None,
    ) -> Tensor:
        """``text`` spoken: mono float32 ``[samples]`` at ``sample_rate``, on the CPU.

        The first six parameters are the original's. ``context`` are earlier turns, oldest first; the oldest are left
        out when they do not fit. None means: as long as the text needs (``max_audio_length_ms``), the checkpoint's own
        (``temperature`` 0..2, ``topk`` >= 1), a random one (``seed``). ``voice`` is the name of a voice in the voices'
        folder, or a Voice; it speaks as ``speaker``. ``timeout`` in seconds counts from now, waiting included.

        Raises InvalidInputError (``param`` says which; PromptTooLongError is one), SilentOutputError,
        RequestTimeoutError, EngineBusyError, EngineError.
        """
        return self.speak(text, speaker, context, max_audio_length_ms, temperature, topk, seed, voice, timeout).audio

    def generate_codes(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Path | Voice | None = None,
        timeout: float | None = None,
    ) -> Tensor:
        """As ``generate``, but the codes int64 ``[frames, K]`` of what is heard, without EOS."""
        return self.speak(text, speaker, context, max_audio_length_ms, temperature, topk, seed, voice, timeout).codes

    def speak(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Path | Voice | None = None,
        timeout: float | None = None,
    ) -> Speech:
        """As ``generate``, with everything that is known about the speech."""
        options = (speaker, context, max_audio_length_ms, temperature, topk, seed, voice, timeout)
        with self.stream(text, *options) as stream:
            audio = torch.cat(list(stream))
        account = stream._account
        return Speech(
            audio=audio,
            sample_rate=self.sample_rate,
            codes=torch.cat(account.codes),
            finish_reason=account.finish_reason or "eos",
            takes=stream.takes,
            seed=account.seed,
            first_sound_seconds=account.first_sound_seconds or 0.0,
            processing_time_seconds=time.monotonic() - account.started,
        )

    def stream(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        max_audio_length_ms: float | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        seed: int | None = None,
        voice: str | Path | Voice | None = None,
        timeout: float | None = None,
    ) -> SpeechStream:
        """As ``generate``, in chunks as they are made. Bad input raises here, all other errors while iterating."""
        started = time.monotonic()
        deadline = None if timeout is None else started + _real("timeout", timeout, 0, 86_400)
        speaker = self._speaker(speaker, "speaker")
        max_frames = self._max_frames(max_audio_length_ms)
        plan = _Plan(
            lines=self._lines(text, speaker, max_frames),
            speaker=speaker,
            heard=self._voice(voice, speaker) + self._context(context),
            max_frames=max_frames,
            temperature=_real("temperature", self._profile.temperature if temperature is None else temperature, 0, 2),
            top_k=_whole("topk", self._profile.top_k if topk is None else topk, 1, 2**31 - 1),
            seed=_whole("seed", secrets.randbits(63) if seed is None else seed, -(2**63), 2**63 - 1),
        )
        for line in plan.lines:  # whatever cannot fit is said now, not after half of the speech
            self._choose(plan, line, None)
        account = Account(plan.seed, started, deadline)
        return SpeechStream(self._perform(plan, account), account)

    def close(self) -> None:
        """End everything that runs or waits, and the engine. May be called again."""
        self._engine.close()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _perform(self, plan: _Plan, account: Account) -> abc.Generator[Tensor, None, None]:
        """Sentence after sentence, each in the context of the one before it."""
        outcome: FinishReason = "eos"
        previous: EncodedSegment | None = None
        for index, line in enumerate(plan.lines):
            rest = plan.max_frames - account.frames
            if index and rest < MIN_REST:
                outcome = "length"
                break
            prompt = self._prompt(plan, line, previous)
            first = Take(index, 0, plan.temperature, plan.top_k, derive_seed(plan.seed, index, 0))
            sentence = Sentence(prompt, first, int(min(line.max_frames, rest)))
            reason = yield from speak_sentence(self._engine, self._settings.silence, sentence, account)
            outcome = reason if outcome == "eos" else outcome
            previous = EncodedSegment(line.text_ids, account.codes[-1], plan.speaker)
        account.finish_reason = outcome
        seconds = time.monotonic() - account.started
        logger.debug("spoke %d frames in %.2f s, takes: %d, %s", account.frames, seconds, len(account.takes), outcome)

    def _prompt(self, plan: _Plan, line: _Line, previous: EncodedSegment | None) -> Tensor:
        """Frames int64 ``[T, K+1]``. Only the turns that fit are encoded, each clip once."""
        chosen = self._choose(plan, line, previous)
        segments = [
            EncodedSegment(heard.text_ids, self._cache.get(heard.segment.audio, self.codec.encode), heard.turn.speaker)
            for heard in (plan.heard[index] for index in chosen if index < len(plan.heard))
        ]
        if previous is not None and len(plan.heard) in chosen:
            segments.append(previous)
        return build_prompt(segments, line.text_ids, self.codec.num_codebooks)

    def _choose(self, plan: _Plan, line: _Line, previous: EncodedSegment | None) -> list[int]:
        """Indices into ``plan.heard``, and its length for ``previous``, of what goes into the prompt."""
        turns = [heard.turn for heard in plan.heard] + ([] if previous is None else [previous.turn])
        window = self._config.max_seq_len
        # The cap is far above what the line should need: reserving all of it would drive context out of a small window.
        reserve = min(line.max_frames, window // 2)
        return fit_context(turns, len(line.text_ids), reserve, plan.speaker, window)

    def _lines(self, text: str, speaker: int, max_frames: float) -> list[_Line]:
        sentences = split_sentences(self._readable(text), self._profile.max_chars)
        frame_rate = self.codec.config.frame_rate
        return [
            _Line(
                text_ids=self._tokenizer.encode(sentence, speaker),
                max_frames=int(min(math.ceil(longest_seconds(sentence) * frame_rate), max_frames)),
            )
            for sentence in sentences
        ]

    def _readable(self, text: str) -> str:
        cleaned = clean(text)
        return spell_out(cleaned) if self._profile.spell_out else cleaned

    def _context(self, context: Sequence[Segment]) -> list[_Heard]:
        if not isinstance(context, Sequence) or not all(isinstance(segment, Segment) for segment in context):
            raise InvalidInputError("context must be a list of Segment(speaker, text, audio), oldest first.", "context")
        return [self._hear(segment, self._speaker(segment.speaker, "context"), "context") for segment in context]

    def _voice(self, voice: str | Path | Voice | None, speaker: int) -> list[_Heard]:
        """A voice's segments, as if ``speaker`` had spoken them: who speaks next with that number sounds like them."""
        if voice is None:
            return []
        if isinstance(voice, str | Path):
            voice = self._voices.get(voice, self._settings.voices)
        if not isinstance(voice, Voice):
            raise InvalidInputError("voice must be the name of a voice, or a Voice.", "voice")
        return [self._hear(segment, speaker, "voice") for segment in voice.segments]

    def _hear(self, segment: Segment, speaker: int, param: str) -> _Heard:
        try:
            text_ids = self._tokenizer.encode(self._readable(segment.text), speaker)
        except InvalidInputError as error:
            raise InvalidInputError(f"A text of {param} cannot be used. {error}", param) from error
        frames = math.ceil(segment.audio.numel() / self.codec.frame_size)
        turn = Turn(segment_length(len(text_ids), frames), speaker, is_voice=param == "voice")
        return _Heard(text_ids, segment, turn)

    def _speaker(self, speaker: int, param: str) -> int:
        known = self._profile.speakers
        if check_speaker(speaker) not in (known or [speaker]):
            numbers = ", ".join(map(str, known or []))
            raise InvalidInputError(f"{self.model_name} has the speakers {numbers}, and no {speaker}.", param)
        return speaker

    def _max_frames(self, milliseconds: float | None) -> float:
        if milliseconds is None:
            return math.inf
        seconds = _real("max_audio_length_ms", milliseconds, 1, 86_400_000) / 1000
        return max(1, math.floor(seconds * self.codec.config.frame_rate))


def longest_seconds(text: str) -> float:
    """How long ``text`` may take at the very most: the backstop against a model that does not end."""
    digits = sum(char.isdigit() for char in text)
    others = sum(char.isalpha() and not char.isascii() for char in text)
    return (
        CAP_SECONDS
        + CAP_SECONDS_PER_CHARACTER * (len(text) - digits - others)
        + CAP_SECONDS_PER_DIGIT * digits
        + CAP_SECONDS_PER_OTHER_LETTER * others
    )


def _real(param: str, value: float, low: float, high: float) -> float:
    """NaN is in no range; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise InvalidInputError(f"{param} must be a number from {low:,} to {high:,}, not {value!r:.40}.", param)
    return float(value)


def _whole(param: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:
        raise InvalidInputError(f"{param} must be a whole number from {low:,} to {high:,}, not {value!r:.40}.", param)
    return int(value)


def load(model: str = "auto", device: str | None = None, settings: Settings | None = None) -> Generator:
    """Load a model and start its engine.

    ``model``: "auto" (CSM-1B on CUDA, else the bundled voice), "bundled", "csm-1b", a folder, or a hub id.  ``device``:
    cuda, mps or cpu; the first that is there unless given here or in ``settings``. Weights are bf16 on CUDA and fp32
    elsewhere, unless ``settings.quantize`` says otherwise (unset, a large model has 16 bits on the CPU); the codec is
    always fp32. A small model on the CPU sets torch's threads to one, for the whole process.
    Raises InvalidInputError, CheckpointError, InsufficientMemoryError.
    """
    settings = settings or Settings()
    started = time.monotonic()
    place = pick_device(device or settings.device)
    checkpoint = find_checkpoint(str(model), place)
    parts = read_parts(checkpoint)
    profile = parts.profile
    quantization = choose(settings.quantize, profile, place, is_large(checkpoint.config))
    codec_state = load_codec_state(checkpoint)
    shapes = Shapes(checkpoint.config, parts.codec, sum(tensor.nbytes for tensor in codec_state.values()))
    precisions = _precisions(quantization, profile, place)
    planned = check_fits(shapes, settings.engine, precisions, free_memory(place))
    codec = Codec(parts.codec, codec_state, place)
    network = load_model(checkpoint, place, reading_dtype(quantization, place))
    if quantization:
        quantize(network, quantization)
    set_threads(checkpoint.config, place)
    generator = Generator(network, codec, parts.tokenizer, profile, settings)
    seconds = time.monotonic() - started
    asked = "as asked" if device or settings.device else "the best here"
    how = f"{place} ({asked}), {quantization or plain_dtype(place)}"
    logger.info("loaded %s for %s on %s, in %.1f s; memory: %s", profile.name, model, how, seconds, planned)
    return generator


def _precisions(chosen: Quantization | None, profile: Profile, place: torch.device) -> list[Precision]:
    """In which ways the weights could be kept, the chosen one first."""
    kinds = {Quantization(mode): dtype for mode, (_, dtype) in layers_for(place).items()}
    first = Precision(plain_dtype(place).itemsize)
    if chosen:
        first = Precision(kinds[Quantization(chosen.mode)].itemsize, chosen)
    return [first, *(Precision(dtype.itemsize, kind) for kind, dtype in kinds.items() if profile.allows(kind))]


def load_csm_1b(device: str | None = None) -> Generator:
    """CSM-1B itself, as in the original: Sesame's repository where it can be read, else its ungated mirror."""
    return load("csm-1b", device)
