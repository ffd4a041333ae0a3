"""The codec: waveform <-> codes through moshi's Mimi, offline and streamed for many slots at once.

Knows nothing of text, requests or the language model. Everything here is fp32: what is audible is never rounded.
Shapes: B/slots streams, n frames, K codebooks, S samples.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.modules import SEANetDecoder, SEANetEncoder
from moshi.modules.streaming import StreamingContainer
from moshi.modules.transformer import ProjectedTransformer, RingKVCache, set_attention_context
from moshi.quantization import SplitResidualVectorQuantizer
from moshi.utils.compile import no_compile
from torch import Tensor, nn

from csm_core.config import CodecConfig
from csm_core.empty_weights import empty_weights
from csm_core.errors import InvalidInputError, ShapeMismatchError
from csm_core.streaming_decoder import Record, StreamingDecoder, Weights

logger = logging.getLogger(__name__)

# A longer push is cut into pieces of this many frames: attention's ring of keys needs room for one piece, and what 16
# frames need at once no longer fits a processor's cache (8 frames: 8.4 ms each, 16: 9.0 ms).
PIECE = 8

_PLAIN = ExitStack()


def _run_plainly() -> None:
    """Process-wide, and for good: no lazy compilation in moshi, no TF32 in convolutions.

    On CUDA moshi would compile its rotary function again for each new chunk length, which needs triton and takes
    seconds; TF32 is off by 1e-3, and what is audible is fp32. Both are global switches of their libraries: turning them
    back after each call would race between threads.
    """
    _PLAIN.enter_context(no_compile())
    torch.backends.cudnn.allow_tf32 = False


def _transformer(config: CodecConfig) -> ProjectedTransformer:
    return ProjectedTransformer(
        input_dimension=config.dim,
        output_dimensions=(config.dim,),
        d_model=config.dim,
        num_heads=config.transformer_heads,
        num_layers=config.transformer_layers,
        dim_feedforward=config.transformer_ffn_dim,
        context=config.transformer_context,
        layer_scale=config.layer_scale,
        causal=True,
        conv_layout=True,
        norm="layer_norm",
        gating="none",
        positional_embedding="rope",
        max_period=10_000,
    )


def build_mimi(config: CodecConfig) -> MimiModel:
    """A Mimi with fresh weights, on the current default device and in eval mode. Training starts from this too."""
    seanet = {
        "dimension": config.dim,
        "ratios": list(config.ratios),
        "n_residual_layers": config.residual_layers,
        "activation": "ELU",
        "norm": "none",
        "causal": True,
        "pad_mode": "constant",
        "compress": 2,
        "dilation_base": 2,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "true_skip": True,
    }
    encoder = SEANetEncoder(n_filters=config.encoder_filters, **seanet)
    quantizer = SplitResidualVectorQuantizer(
        n_q=config.total_codebooks,
        n_q_semantic=1,
        bins=config.codebook_size,
        dimension=config.codebook_dim,
        input_dimension=config.dim,
        output_dimension=config.dim,
    )
    mimi = MimiModel(
        encoder,
        SEANetDecoder(n_filters=config.decoder_filters, **seanet),
        quantizer,
        frame_rate=config.frame_rate,
        encoder_frame_rate=config.sample_rate / encoder.hop_length,
        sample_rate=config.sample_rate,
        channels=1,
        causal=True,
        encoder_transformer=_transformer(config),
        decoder_transformer=_transformer(config),
        resample_method="conv",
        upsample_channel_wise_bug=config.channel_wise_upsample,
    )
    mimi.set_num_codebooks(config.num_codebooks)
    return mimi.eval()


class _Decoder(StreamingContainer):  # type: ignore[misc]  # moshi has no types
    """The half of Mimi that speaks, with Mimi's names: codes [B, K, n] -> PCM [B, S]."""

    def __init__(self, mimi: MimiModel) -> None:
        super().__init__()
        self.quantizer = mimi.quantizer
        self.upsample = mimi.upsample
        self.decoder_transformer = mimi.decoder_transformer
        self.decoder = mimi.decoder

    def forward(self, codes: Tensor) -> Tensor:
        (latent,) = self.decoder_transformer(self.upsample(self.quantizer.decode(codes)))
        pcm: Tensor = self.decoder(latent)[:, 0]
        return pcm


class _Encoder(nn.Module):
    """The half of Mimi that listens, up to its quantizer: PCM [B, 1, S] -> latent [B, dim, n]."""

    def __init__(self, mimi: MimiModel) -> None:
        super().__init__()
        self.encoder = mimi.encoder
        self.encoder_transformer = mimi.encoder_transformer
        self.downsample = mimi.downsample

    def forward(self, pcm: Tensor) -> Tensor:
        (latent,) = self.encoder_transformer(self.encoder(pcm))
        downsampled: Tensor = self.downsample(latent)
        return downsampled


def _part(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a whole Mimi's state that belong to one of its halves."""
    own = {name.split(".")[0] for name in module.state_dict()}
    return {name: value for name, value in state.items() if name.split(".")[0] in own}


def _load(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a module built on ``meta`` its weights, fp32 on ``device``; those already there are not copied."""
    placed = {
        name: value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
        for name, value in weights.items()
    }
    try:
        module.load_state_dict(placed, assign=True)
    except RuntimeError as error:
        raise ShapeMismatchError(f"The codec's weights do not fit its configuration. {error}") from error
    module.requires_grad_(False)


class _PlainDecoder:
    """moshi's own modules as a decoder of ``slots`` rows.

    moshi keeps streaming state inside its modules. Here it is put in for the length of a pass and taken out again, so
    that any number of streams and plain ``decode`` calls can share one set of weights.
    """

    def __init__(self, decoder: _Decoder, lock: Lock, slots: int, context: int) -> None:
        self._decoder = decoder
        self._lock = lock
        # moshi's ring of keys holds exactly the attention's context: writing a chunk first overwrites what the chunk's
        # first positions should still see, and streaming differs from offline after 10 s. So: longer by a piece.
        with lock:
            set_attention_context(decoder, context + PIECE * decoder.upsample.convtr.convtr.convtr.stride[0])
            try:
                with decoder.streaming(slots):
                    self._states: dict[str, Any] = decoder.get_streaming_state()
            finally:
                set_attention_context(decoder, context)
        self._absent = dict.fromkeys(self._states)
        self._active = torch.ones(slots, dtype=torch.bool, device=next(decoder.parameters()).device)
        for state in self._states.values():
            state.exec_mask = self._active  # one mask for all modules instead of forty copies of it

    @property
    def state(self) -> Sequence[Tensor]:
        values = [
            value for state in self._states.values() for name, value in vars(state).items() if name != "exec_mask"
        ]
        rings = [value for value in values if isinstance(value, RingKVCache)]
        return [
            *(value for value in values if isinstance(value, Tensor)),
            *(ring.end_offset for ring in rings),
            *(ring.cache.transpose(0, 1) for ring in rings),
        ]

    def decode(self, codes: Tensor, active: Tensor) -> Tensor:
        b, slots = len(codes), len(self._active)
        self._active.zero_()
        self._active[:b] = active
        columns = nn.functional.pad(codes, (0, 0, 0, 0, 0, slots - b)).transpose(1, 2)  # [slots, K, n]
        with self._lock:
            self._decoder.set_streaming_state(self._states)
            try:
                pcm: Tensor = self._decoder(columns)
            finally:
                self._decoder.set_streaming_state(self._absent)
        return pcm[:b]


class DecodeStream:
    """Decoder state for ``slots`` rows that advance and restart independently; ``Codec.stream`` makes it.

    On CUDA its work goes through a stream of its own, beside whatever else is queued there.
    """

    def __init__(
        self, decoder: _PlainDecoder | StreamingDecoder, slots: int, check: Callable[[Tensor, int], None]
    ) -> None:
        self.slots = slots
        self._decoder = decoder
        self._check = check
        self._device = decoder.state[0].device
        self._queue = None
        if self._device.type == "cuda":
            self._queue = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._queue.wait_stream(torch.cuda.current_stream(self._device))  # which filled the state with zeros

    @property
    def nbytes(self) -> int:
        """Bytes of the state, allocated here and now, for all slots."""
        return sum(tensor.nbytes for tensor in self._decoder.state)

    @torch.no_grad()
    def push(self, codes: Tensor, active: Tensor | None = None) -> Tensor:
        """The next n frames of the first b slots: codes int ``[b, n, K]`` -> PCM float32 ``[b, n * frame_size]``.

        The PCM is on the CPU: it was waited for, and nothing else on the device was. The state of the other slots stays
        as it is, also where ``active`` (bool ``[b]``) is false; there the PCM means nothing. Raises InvalidInputError
        as ``decode`` does, and for b > slots; codes already on an accelerator are trusted, a check would wait for it.
        """
        self._check(codes, 3)
        b, n, _ = codes.shape
        if b > self.slots:
            raise InvalidInputError(f"This stream has {self.slots} slots, not {b}.", "codes")
        if not n:
            return torch.zeros(b, 0)
        if self._queue is not None and codes.is_cuda:
            self._queue.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._queue):
            codes = codes.to(self._device)
            active = torch.ones(b, dtype=torch.bool) if active is None else active
            active = active.to(self._device)
            pieces = [
                self._decoder.decode(piece, active).to("cpu", copy=True) for piece in torch.split(codes, PIECE, 1)
            ]
        return torch.cat(pieces, dim=-1)

    @torch.no_grad()
    def reset(self, slot: int) -> None:
        """Let one slot start afresh; the others do not notice."""
        with torch.cuda.stream(self._queue):
            for tensor in self._decoder.state:
                tensor[slot].zero_()

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Let slot ``target`` go on where ``source`` is."""
        with torch.cuda.stream(self._queue):
            for tensor in self._decoder.state:
                tensor[target] = tensor[source]


class Codec:
    """A Mimi for many threads: ``decode`` and every stream share the weights, each stream has a state of its own.

    ``state`` are moshi's names of a whole MimiModel. The encoder's half stays where it is until the first ``encode``.
    """

    def __init__(self, config: CodecConfig, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        _run_plainly()
        self.config = config
        self.device = torch.device(device)
        with empty_weights():
            mimi = build_mimi(config)
        self._decoder = _Decoder(mimi)
        _load(self._decoder, _part(self._decoder, state), self.device)
        self._encoder = _Encoder(mimi)
        self._encoder_state: dict[str, Tensor] | None = _part(self._encoder, state)
        self._weights: Weights | None = None  # of the fast streams, made for the first
        self._decoder_lock = Lock()  # a plain stream puts its state into the modules while it runs
        self._encoder_lock = Lock()

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def frame_size(self) -> int:
        """Samples per frame."""
        return self.config.frame_size

    @property
    def num_codebooks(self) -> int:
        return self.config.num_codebooks

    @torch.no_grad()
    def encode(self, pcm: Tensor) -> Tensor:
        """PCM ``[S]`` at ``sample_rate`` -> codes int64 ``[ceil(S / frame_size), K]`` on the CPU.

        The last frame is filled up with zeros. Raises InvalidInputError for another shape.
        """
        if pcm.ndim != 1:
            raise InvalidInputError(f"Audio must be mono [samples], not of shape {tuple(pcm.shape)}.", "audio")
        if not pcm.numel():
            return torch.zeros(0, self.num_codebooks, dtype=torch.int64)
        padding = -pcm.numel() % self.frame_size
        padded = nn.functional.pad(pcm.to(self.device, torch.float32), (0, padding))
        with self._encoder_lock:
            if self._encoder_state is not None:
                _load(self._encoder, self._encoder_state, self.device)
                self._encoder_state = None
            latent = self._encoder(padded[None, None])
        codes: Tensor = self._decoder.quantizer.encode(latent)
        return codes[0].T.contiguous().cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int ``[n, K]`` -> PCM float32 ``[n * frame_size]`` on the codec's device, in one pass.

        Raises InvalidInputError for another shape or a code outside the codebooks.
        """
        self._check(codes.cpu(), 2)
        if not codes.shape[0]:
            return torch.zeros(0, device=self.device)
        with self._decoder_lock:
            pcm: Tensor = self._decoder(codes.to(self.device).T[None])
        return pcm[0]

    def stream(self, slots: int = 1, fast: bool = True, record: Record | None = None) -> DecodeStream:
        """Streaming decoding for ``slots`` independent rows, each as good as ``decode``.

        ``fast``: our own StreamingDecoder; else moshi's modules, the plain path. ``record`` makes a CUDA graph of each
        shape that the fast one decodes: see there.
        """
        stream = DecodeStream(self._rows(slots, fast, record), slots, self._check)
        logger.info("The codec keeps %.1f MB for %d streams.", stream.nbytes / 1e6, slots)
        return stream

    @torch.no_grad()
    def _rows(self, slots: int, fast: bool, record: Record | None) -> _PlainDecoder | StreamingDecoder:
        if not fast:
            return _PlainDecoder(self._decoder, self._decoder_lock, slots, self.config.transformer_context)
        with self._decoder_lock:
            if self._weights is None:
                self._weights = Weights(self._decoder)
        return StreamingDecoder(self._weights, slots, PIECE, record)

    def _check(self, codes: Tensor, ndim: int) -> None:
        if codes.ndim != ndim or codes.shape[-1] != self.num_codebooks or codes.is_floating_point():
            raise InvalidInputError(
                f"Codes must be integers [frames, {self.num_codebooks}], not {codes.dtype} {tuple(codes.shape)}.",
                "codes",
            )
        if (
            codes.device.type == "cpu"
            and codes.numel()
            and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size
        ):
            raise InvalidInputError(f"Codes must be within 0..{self.config.codebook_size - 1}.", "codes")
