"""The tensors of all slots: read a prompt into one, advance some by a frame, decode their frames to PCM.

Knows no queue, no thread, no clock and no end of a request: the engine tells it which slots. A frame is one function
over static tensors (``_advance``), so that it can be compiled and recorded; nothing waits for it but ``Step.frames``.
Shapes: B rows (those that a step computes), K codebooks, T frames of a prompt.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from csm_core.codec import Codec
from csm_core.config import EngineConfig
from csm_core.engine.graphs import Compiler, CudaRecorder, Function, Graphs
from csm_core.engine.request import Request
from csm_core.engine.sampling import Draw, gumbel, sample
from csm_core.engine.scheduler import Frame
from csm_core.model.csm import ABSENT, CSM, Pick, Scratch, cached_block
from csm_core.model.kv_cache import KVCache, Prefix

# Attention reads the cache up to the longest slot of the step, rounded up: to this many positions ...
CACHE_STEP = 128
# ... or, where each shape is compiled or recorded, to a power of two from here on. (A longer neighbour changes nothing
# but time: masked positions add exact zeros.)
MIN_LENGTH = 256

# So many logits are sorted to draw a code, or all. 1: every row takes the best, and there is no noise.
TOP_KS = (1, 64)

MIN_PIECE = 16  # a piece of a prompt is padded to a power of two from here on, where shapes are compiled or recorded

BROKEN = -1  # in place of the codes of a row whose hidden state is NaN or infinite

UNREAD = 4  # steps whose frames may wait to be read


class Shape(NamedTuple):
    """What of a step the host decides: how many rows, how much of the cache, how many logits are sorted."""

    batch: int
    length: int
    limit: int


class Step:
    """One launched frame. ``frames`` waits for it, and for nothing that was launched after it."""

    def __init__(self, codes: Tensor, rows: Sequence[int], landing: Tensor) -> None:
        self._rows = rows
        self._landing = landing[: len(codes)]
        self._landing.copy_(codes, non_blocking=True)
        self._landed = torch.cuda.Event() if codes.is_cuda else None  # type: ignore[no-untyped-call]
        if self._landed is not None:
            self._landed.record()  # type: ignore[no-untyped-call]

    def frames(self) -> list[Frame]:
        """What each slot of the step got, in their order: K codes, all BROKEN where the model broke.

        To be read before ``UNREAD`` further steps are launched.
        """
        if self._landed is not None:
            self._landed.synchronize()
        frames = self._landing.tolist()
        return [tuple(frames[row]) for row in self._rows]


class Runner:
    """Everything that one request needs from the model between its frames, as tensors with one row per slot.

    A step computes the first B rows, busy or not. A row that is idle meanwhile (free, or being prefilled) reads and
    writes at its own ``position`` alone, which whoever uses the slot overwrites before anything attends to it; nothing
    of the row moves on. So its codes are noise that nobody reads, and its neighbours do not notice.
    """

    def __init__(self, model: CSM, codec: Codec, config: EngineConfig) -> None:
        shape, weight = model.config, model.text_embedding.weight
        self.model = model
        self.slots = slots = config.slots
        self.window = shape.max_seq_len
        self._config = config
        self._device = device = weight.device
        self._cache = KVCache(shape.backbone, slots, self.window, weight.dtype, device)
        on_cuda = device.type == "cuda"
        graphs = config.batch_buckets and (on_cuda if config.graphs is None else config.graphs)
        # The decoder's graphs run beside the model's, so they have a recorder, and with it memory, of their own.
        self._decoder = codec.stream(slots, config.fast_codec, CudaRecorder(device) if graphs and on_cuda else None)
        columns = shape.num_codebooks + 1
        self._input = torch.full((slots, columns), ABSENT, device=device)  # what the next step reads ...
        self._position = torch.zeros(slots, dtype=torch.int64, device=device)  # ... where it reads it
        self._frame = torch.zeros_like(self._position)  # number of the frame that the next step makes
        self._seed = torch.zeros_like(self._position)
        self._top_k = torch.ones_like(self._position)
        self._min_frames = torch.zeros_like(self._position)
        self._temperature = torch.zeros(slots, device=device)
        self._active = torch.zeros(slots, dtype=torch.bool, device=device)
        self._is_zero = torch.arange(shape.codebook_size, device=device) == 0
        self._scratch = Scratch(model, slots)
        self._running: frozenset[int] = frozenset()  # what the host knows without asking the device: active slots ...
        self._lengths = [0] * slots  # ... positions in the cache ...
        self._top_ks = [1] * slots  # ... and how far logits have to be sorted
        self._fixed = graphs or config.compile  # few shapes, all of them known beforehand
        self.compiler = Compiler() if config.compile else None
        self._run_block = self._compiled(cached_block)
        self._gumbel, self._sample = self._compiled(gumbel), self._compiled(sample)
        self.graphs = Graphs(self._advance, CudaRecorder(device) if graphs and on_cuda else None)
        landing = torch.empty(UNREAD, slots, shape.num_codebooks, dtype=torch.int64, pin_memory=on_cuda)
        self._landings = cycle(landing)  # on the host, where each step's codes arrive

    def begin(self, slot: int, request: Request) -> None:
        """Forget everything of a slot's last request and take the sampling of the next; nothing of it is read yet."""
        params = request.params
        greedy = params.temperature == 0  # the best of all is the best of one
        self._cache.reset(slot)
        self._decoder.reset(slot)
        self._frame[slot] = 0
        self._seed[slot] = params.seed
        self._temperature[slot] = params.temperature
        self._top_ks[slot] = 1 if greedy else min(params.top_k, self.model.config.codebook_size)
        self._top_k[slot] = self._top_ks[slot]
        self._min_frames[slot] = params.min_frames
        self._have_read(slot, 0)

    @torch.no_grad()
    def prefill(self, slot: int, prompt: Tensor, start: int, stop: int) -> None:
        """Read the frames ``start`` .. ``stop`` - 1 of ``prompt`` int64 [T, K+1] at the same positions of a slot.

        ``stop`` < T: the last frame is left to the first step, which is then like every other.
        """
        if start >= stop:
            return
        frames = prompt[None, start:stop].to(self._device, non_blocking=True)
        positions = torch.arange(start, stop, device=self._device).unsqueeze(0)
        if self._fixed:
            # What the padding writes is overwritten before anything attends to it. The window's last position is never
            # part of a prefill, so the padding that would stand beyond it can be put there.
            padding = max(MIN_PIECE, _power_of_two(stop - start)) - (stop - start)
            frames = pad(frames, (0, 0, 0, padding), value=ABSENT)
            positions = torch.arange(start, stop + padding, device=self._device).clamp(max=self.window - 1).unsqueeze(0)
        row = torch.tensor([slot]).to(self._device, non_blocking=True)
        self.model.forward_backbone(frames, positions, self._cache.upto(self._length(stop)), row)
        self._have_read(slot, stop)

    def ready(self, slot: int, prompt: Tensor) -> None:
        """All but the last frame of ``prompt`` is in the cache: the slot's next step reads that one."""
        self._input[slot] = prompt[-1].to(self._device, non_blocking=True)
        self._have_read(slot, len(prompt) - 1)

    @torch.no_grad()
    def step(self, slots: Sequence[int]) -> Step:
        """Launch one frame for ``slots`` (ascending), without waiting for it."""
        length = self._length(max(self._lengths[slot] for slot in slots) + 1)
        limit = self._limit(max(self._top_ks[slot] for slot in slots))
        if self._config.batch_buckets:
            rows: Sequence[int] = slots
            shape = Shape(self._config.bucket(slots[-1] + 1), length, limit)
            if shape not in self.graphs:  # warm_up did not see it
                self._activate(())
                self.graphs.prepare(shape)
            self._activate(slots)
            codes = self.graphs(shape)
        else:
            rows = range(len(slots))
            self._activate(slots)
            which = torch.tensor(slots).to(self._device, non_blocking=True)
            codes = self._advance(Shape(len(slots), length, limit), which)
        for slot in slots:
            self._lengths[slot] = min(self._lengths[slot] + 1, self.window)
        return Step(codes, rows, next(self._landings))

    def _advance(self, shape: Shape, rows: Tensor | None = None) -> Tensor:
        """One frame of the first B rows, or of ``rows``: what each drew [B, K]. Only active rows move on by it.

        No host sync, no shape that depends on data, and no tensor that outlives it but the result: see graphs.py.
        """
        at = slice(shape.batch) if rows is None else rows
        frames, position, active = self._input[at], self._position[at], self._active[at]
        cache = self._cache.upto(shape.length)
        hidden = self.model.forward_backbone(frames.unsqueeze(1), position.unsqueeze(1), cache, rows, self._run_block)[
            :, -1
        ]
        codes = self.model.decode_frame(hidden, self._pick(shape, at), self._scratch, self._run_block)
        self._input[at] = torch.where(active.unsqueeze(1), pad(codes, (0, 1), value=ABSENT), frames)
        self._position[at] = (position + active).clamp_(max=self.window - 1)
        self._frame[at] = self._frame[at] + active
        return codes.masked_fill(hidden.isfinite().all(dim=-1, keepdim=True).logical_not_(), BROKEN)

    def _pick(self, shape: Shape, at: slice | Tensor) -> Pick:
        """How the rows' codes are chosen from their logits: only codes that the codec has, and no end too early."""
        count, entries = self.model.config.num_codebooks, self.model.config.codebook_size
        number, temperature = self._frame[at], self._temperature[at]
        # The end is a frame of zeros: without a zero in its first codebook there is none.
        banned = (number < self._min_frames[at]).unsqueeze(1) & self._is_zero
        if shape.limit > 1:
            draw = Draw.of(temperature, self._top_k[at], shape.limit)
            noise = self._gumbel(self._seed[at], number, count, entries) * (temperature > 0)[:, None, None]

        def pick(logits: Tensor, codebook: int) -> Tensor:
            logits = logits[:, :entries]
            if codebook == 0:
                logits = logits.masked_fill(banned, float("-inf"))
            if shape.limit == 1:
                return logits.argmax(dim=-1)
            return self._sample(logits, noise[:, codebook], draw, shape.limit)

        return pick

    def decode(self, chunks: Mapping[int, Sequence[Frame]]) -> dict[int, Tensor]:
        """Next frames of some slots -> their PCM float32 ``[n * frame_size]`` on the CPU; equal lengths together."""
        sound: dict[int, Tensor] = {}
        for length in {len(frames) for frames in chunks.values()}:
            due = [slot for slot, frames in chunks.items() if len(frames) == length]
            rows = self._config.bucket(max(due) + 1)
            codes = torch.zeros(rows, length, self.model.config.num_codebooks, dtype=torch.int64)
            active = torch.zeros(rows, dtype=torch.bool)
            for slot in due:
                codes[slot] = torch.tensor(chunks[slot])
                active[slot] = True
            pcm = self._decoder.push(codes, active)
            sound.update({slot: pcm[slot].clone() for slot in due})
        return sound

    def move(self, source: int, target: int) -> None:
        """Let a request go on in the free slot ``target``; ``source`` is free then."""
        self._cache.reset(target)
        self._cache.copy_prefix(source, target, self._lengths[source])
        self._decoder.move(source, target)
        for state in (self._input, self._frame, self._seed, self._top_k, self._min_frames, self._temperature):
            state[target] = state[source]
        self._position[target] = self._position[source]
        self._lengths[target], self._top_ks[target] = self._lengths[source], self._top_ks[source]

    def save_prefix(self, slot: int, length: int) -> Prefix:
        """A copy of what a slot read at positions 0 .. ``length`` - 1."""
        return self._cache.save(slot, length)

    def load_prefix(self, slot: int, prefix: Prefix, length: int) -> None:
        """Let a slot have read the first ``length`` positions of ``prefix``."""
        self._cache.load(slot, prefix, length)
        self._have_read(slot, length)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile and record every shape once, so that none is new later. To be called while all slots are free."""
        if not self._fixed:
            return
        batches = {self._config.bucket(row + 1) for row in range(self.slots)}
        lengths = {self._length(position + 1) for position in range(self.window)}
        limits = {self._limit(top_k) for top_k in range(1, self.model.config.codebook_size + 1)}
        for shape in sorted(map(Shape._make, product(batches, lengths, limits)), reverse=True):  # the largest first:
            if shape not in self.graphs:  # the others find room in its memory
                self.graphs.prepare(shape)
        if self._device.type == "cuda":
            prompt = torch.full((self._config.prefill_piece, self._input.shape[1]), ABSENT)
            for size in {min(len(prompt), _power_of_two(stop)) for stop in range(1, len(prompt) + 1)}:
                self.prefill(0, prompt, 0, size)
            self._cache.reset(0)
            for rows, frames in product(sorted(batches, reverse=True), range(1, max(self._config.chunk_schedule) + 1)):
                codes = torch.zeros(rows, frames, self.model.config.num_codebooks, dtype=torch.int64)
                self._decoder.push(codes, torch.zeros(rows, dtype=torch.bool))

    def _compiled(self, function: Function) -> Function:
        return function if self.compiler is None else self.compiler(function)

    def _activate(self, slots: Sequence[int]) -> None:
        """Let these rows move on and no others. One small launch for each that changed, none in most steps."""
        running = frozenset(slots)
        for slot in running ^ self._running:
            self._active[slot] = slot in running
        self._running = running

    def _have_read(self, slot: int, length: int) -> None:
        self._position[slot] = self._lengths[slot] = length

    def _length(self, positions: int) -> int:
        """How far attention reads to cover so many positions."""
        if self._fixed:
            return min(max(MIN_LENGTH, _power_of_two(positions)), self.window)
        return min(-(-positions // CACHE_STEP) * CACHE_STEP, self.window)

    def _limit(self, top_k: int) -> int:
        """How many logits are sorted for so high a top-k."""
        return next((limit for limit in TOP_KS if top_k <= limit), self.model.config.codebook_size)


def _power_of_two(number: int) -> int:
    """The next one, from ``number`` on."""
    return 1 << (number - 1).bit_length()
