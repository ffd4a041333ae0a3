"""Many callers of the voice that ships: each hears its own text, whoever else is there, however wide the batch."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from csm_core.codec import Codec
from csm_core.config import CodecConfig, EngineConfig
from csm_core.engine.engine import Engine
from csm_core.engine.request import Chunk, End, Event, Failure, Request, SamplingParams
from csm_core.engine.runner import Runner
from csm_core.model.checkpoint import find_checkpoint, load_codec_state, load_model, load_tokenizer
from csm_core.model.csm import CSM
from csm_core.prompt import build_prompt
from csm_core.text import TextTokenizer

TEXTS = [
    "yes.", "no.", "good morning.", "how are you?", "it is late.", "come here.", "see you soon.", "what is that?",
    "i do not know.", "wait a moment.", "the door is open.", "thank you.", "ten past six.", "over there.", "why not?",
    "turn left.",
]  # fmt: skip

FRAMES = 18  # one newcomer is let in per frame: the first still speaks when the last begins
ENOUGH = 6  # to tell the texts apart

Voice = tuple[CSM, Codec, list[Tensor]]


@pytest.fixture(scope="module")
def voice() -> Voice:
    """The bundled voice, and a prompt for each text."""
    checkpoint = find_checkpoint("bundled", torch.device("cpu"))
    config = checkpoint.config
    tokenizer = TextTokenizer(load_tokenizer(checkpoint), config.bos_id, config.eos_id)
    codec = Codec(CodecConfig.from_dict(checkpoint.codec), load_codec_state(checkpoint))
    prompts = [build_prompt([], tokenizer.encode(text, 0), config.num_codebooks) for text in TEXTS]
    return load_model(checkpoint, "cpu", torch.float32), codec, prompts


class Caller:
    def __init__(self, prompt: Tensor, seed: int, frames: int) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.request = Request(prompt, SamplingParams(0.6, 50, seed, max_frames=frames, min_frames=FRAMES), self.hear)

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, End | Failure):
            self.ended.set()

    def codes(self) -> list[list[int]]:
        assert self.ended.wait(120)
        assert isinstance(self.events[-1], End)
        return [frame for event in self.events if isinstance(event, Chunk) for frame in event.codes.tolist()]


@pytest.fixture
def start(voice: Voice) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(**config: object) -> Engine:
        engines.append(Engine(voice[0], voice[1], EngineConfig(chunk_schedule=(6,), **config)))  # type: ignore[arg-type]
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def test_sixteen_texts_at_once_are_the_sixteen_texts_alone(start: Callable[..., Engine], voice: Voice) -> None:
    engine, alone = start(batch_buckets=False, lookahead=0), []
    for seed, prompt in enumerate(voice[2]):
        caller = Caller(prompt, seed, ENOUGH)
        engine.submit(caller.request)
        alone.append(caller.codes())
    engine = start(slots=16)
    rows: list[int] = []
    hook = voice[0].codebook0_head.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    callers = [Caller(prompt, seed, FRAMES) for seed, prompt in enumerate(voice[2])]
    with engine._changed:  # all at once
        for caller in callers:
            engine.submit(caller.request)
    together = [caller.codes() for caller in callers]
    hook.remove()
    # Each is like one lone run, its own, and like no other.
    assert [[index for index, codes in enumerate(alone) if codes == heard[:ENOUGH]] for heard in together] == [
        [index] for index in range(16)
    ]
    assert max(rows) == 16


def test_logits_hardly_depend_on_the_width_of_the_batch(voice: Voice) -> None:
    """The same request in batches of 1, 2, 4, 8 and 16: equal codes, logits equal up to fp32 rounding."""
    model, codec, prompts = voice
    logits: list[Tensor] = []
    hook = model.codebook0_head.register_forward_hook(lambda module, args, out: logits.append(out[0].clone()))
    codes, runs = [], []
    for width in (1, 2, 4, 8, 16):
        runner = Runner(model, codec, EngineConfig(slots=16))
        for slot in range(width):
            request = Request(prompts[slot], SamplingParams(seed=slot, max_frames=9), lambda event: None)
            runner.begin(slot, request)
            runner.prefill(slot, request.prompt, 0, len(request.prompt) - 1)
            runner.ready(slot, request.prompt)
        logits.clear()
        codes.append([runner.step(range(width)).frames()[0] for _ in range(4)])
        runs.append(torch.stack(logits))
    hook.remove()
    assert all(others == codes[0] for others in codes)
    largest = max(float((run - runs[0]).abs().max()) for run in runs)
    scale = float(runs[0].abs().max())
    print(f"largest difference of a logit {largest:.1e}, largest logit {scale:.1f}")
    assert largest <= 1e-5 * scale
