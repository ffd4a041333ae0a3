"""The tensors of all slots: prefill a prompt into one, advance some by a frame, decode their frames to PCM.

Plain and synchronous. Knows no queue, no thread, no clock and no end of a request: the engine tells it which slots.
Shapes: R rows (the slots of this step), K codebooks, T frames of a prompt.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csm_core.codec import Codec
from csm_core.engine.request import Request
from csm_core.engine.sampling import gumbel, sample
from csm_core.engine.scheduler import Frame
from csm_core.model.csm import ABSENT, CSM
from csm_core.model.kv_cache import KVCache

# Attention reads the cache up to the longest slot, rounded up to this many positions: few shapes, little waste.
CACHE_STEP = 128

BROKEN = -1  # in place of the codes of a row whose hidden state is NaN or infinite


class Runner:
    """Everything that one request needs from the model between its frames, as tensors with one row per slot."""

    def __init__(self, model: CSM, codec: Codec, slots: int) -> None:
        config, weight = model.config, model.text_embedding.weight
        self.model = model
        self.slots = slots
        self.window = config.max_seq_len
        self._device = weight.device
        self._cache = KVCache(config.backbone, slots, self.window, weight.dtype, self._device)
        self._decoder = codec.stream(slots)
        columns = config.num_codebooks + 1
        self._input = torch.full((slots, columns), ABSENT, device=self._device)  # the frame that the next step reads
        self._position = torch.zeros(slots, dtype=torch.int64, device=self._device)  # where it reads it
        self._frame = torch.zeros_like(self._position)  # number of the frame that the next step makes
        self._seed = torch.zeros_like(self._position)
        self._top_k = torch.ones_like(self._position)
        self._min_frames = torch.zeros_like(self._position)
        self._temperature = torch.zeros(slots, device=self._device)
        self._lengths = [0] * slots  # what the host has to know without asking the device: positions in the cache ...
        self._top_ks = [1] * slots  # ... and how far logits have to be sorted

    @torch.no_grad()
    def prefill(self, slot: int, request: Request) -> None:
        """Make a slot ready for a request: everything of the last one forgotten, the prompt but its last frame read.

        The last frame is left to the first step, which is then like every other.
        """
        prompt, params = request.prompt.to(self._device), request.params
        length = len(prompt) - 1
        self._cache.reset(slot)
        self._decoder.reset(slot)
        if length:
            rows = torch.tensor([slot], device=self._device)
            self.model.forward_backbone(prompt[None, :-1], cache=self._cache_upto(length), rows=rows)
        self._input[slot] = prompt[-1]
        self._position[slot] = length
        self._frame[slot] = 0
        self._seed[slot] = params.seed
        self._temperature[slot] = params.temperature
        self._top_k[slot] = self._top_ks[slot] = min(params.top_k, self.model.config.codebook_size)
        self._min_frames[slot] = params.min_frames
        self._lengths[slot] = length

    @torch.no_grad()
    def step(self, slots: Sequence[int]) -> list[Frame]:
        """Advance ``slots`` (ascending) by one frame; what each got: K codes, all BROKEN if the model broke."""
        rows = torch.tensor(slots, device=self._device)
        contiguous = list(slots) == list(range(len(slots)))  # then the cache is read in place, without a copy
        hidden = self.model.forward_backbone(
            self._input[rows].unsqueeze(1),
            self._position[rows].unsqueeze(1),
            self._cache_upto(max(self._lengths[slot] for slot in slots) + 1),
            None if contiguous else rows,
        )[:, -1]
        codes = self._sample_frame(hidden, rows, max(self._top_ks[slot] for slot in slots))
        self._input[rows] = torch.nn.functional.pad(codes, (0, 1), value=ABSENT)
        self._position[rows] += 1
        self._frame[rows] += 1
        for slot in slots:
            self._lengths[slot] += 1
        sound = hidden.isfinite().all(dim=-1, keepdim=True)
        return [tuple(frame) for frame in codes.where(sound, BROKEN).tolist()]

    def _sample_frame(self, hidden: Tensor, rows: Tensor, max_top_k: int) -> Tensor:
        """``hidden`` [R, dim] -> codes [R, K], only codes that the codec has."""
        config = self.model.config
        noise = gumbel(self._seed[rows], self._frame[rows], config.num_codebooks, config.codebook_size)
        temperature, top_k = self._temperature[rows], self._top_k[rows]
        too_early = (self._frame < self._min_frames)[rows]

        def pick(logits: Tensor, codebook: int) -> Tensor:
            logits = logits[:, : config.codebook_size]
            if codebook == 0:  # the end is a frame of zeros: without a zero here there is none
                first = torch.arange(config.codebook_size, device=logits.device) == 0
                logits = logits.masked_fill(too_early.unsqueeze(1) & first, float("-inf"))
            return sample(logits, noise[:, codebook], temperature, top_k, max_top_k)

        return self.model.decode_frame(hidden, pick)

    def decode(self, chunks: Mapping[int, Sequence[Frame]]) -> dict[int, Tensor]:
        """Next frames of some slots -> their PCM float32 ``[n * frame_size]`` on the CPU; equal lengths together."""
        sound: dict[int, Tensor] = {}
        for length in {len(frames) for frames in chunks.values()}:
            codes = torch.zeros(self.slots, length, self.model.config.num_codebooks, dtype=torch.int64)
            active = torch.zeros(self.slots, dtype=torch.bool)
            for slot, frames in chunks.items():
                if len(frames) == length:
                    codes[slot] = torch.tensor(frames)
                    active[slot] = True
            pcm = self._decoder.push(codes, active).cpu()
            sound.update({slot: pcm[slot].clone() for slot in chunks if active[slot]})
        return sound

    def _cache_upto(self, length: int) -> KVCache:
        return self._cache.upto(min(-(-length // CACHE_STEP) * CACHE_STEP, self.window))
