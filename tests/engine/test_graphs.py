"""Recording, replaying and compiling a frame: the same codes as the plain path, and nothing new after the warm-up."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from csm_core.codec import Codec
from csm_core.config import EngineConfig
from csm_core.engine.graphs import Compiler, CudaRecorder, Graphs
from csm_core.engine.request import Request, SamplingParams
from csm_core.engine.runner import Runner
from csm_core.engine.scheduler import Frame
from csm_core.model.csm import ABSENT, CSM
from tests.engine.tape import Tape

MakeRunner = Callable[..., Runner]


def request(seed: int, length: int, temperature: float = 0.9, top_k: int = 20) -> Request:
    prompt = torch.full((length, 3), ABSENT)
    prompt[:, -1] = torch.randint(2, 64, (length,), generator=torch.Generator().manual_seed(seed))
    return Request(prompt, SamplingParams(temperature, top_k, seed), lambda event: None)


def start(runner: Runner, slot: int, wish: Request, piece: int = 32) -> None:
    runner.begin(slot, wish)
    for first in range(0, len(wish.prompt) - 1, piece):
        runner.prefill(slot, wish.prompt, first, min(first + piece, len(wish.prompt) - 1))
    runner.ready(slot, wish.prompt)


def mixed_load(runner: Runner) -> dict[int, list[Frame]]:
    """Nine requests of all lengths and samplings come and go on four slots; frames by request."""
    wishes = [request(n, 3 + 37 * n, *[(0.0, 5), (0.9, 20), (1.2, 61)][n % 3]) for n in range(9)]
    heard: dict[int, list[Frame]] = {n: [] for n in range(9)}
    running: dict[int, int] = {}
    waiting = list(range(9))
    while waiting or running:
        for slot in set(range(runner.slots)) - set(running):
            if waiting and (len(waiting) % 4 != 1 or not running):
                running[slot] = waiting.pop(0)
                start(runner, slot, wishes[running[slot]])
        slots = sorted(running)
        for slot, frame in zip(slots, runner.step(slots).frames(), strict=True):
            heard[running[slot]].append(frame)
        running = {slot: n for slot, n in running.items() if len(heard[n]) < 3 + n}
    return heard


@pytest.fixture
def compile_simply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo as always, but its graphs are run instead of being made into C++: seconds, not minutes."""
    monkeypatch.setattr("csm_core.engine.runner.Compiler", partial(Compiler, "eager"))


@pytest.fixture
def make_runner(tiny_model: CSM, tiny_codec: Codec, compile_simply: None) -> MakeRunner:
    def make_runner(slots: int = 4, **switches: bool) -> Runner:
        runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=slots, **switches))
        if switches.get("graphs"):
            runner.graphs = Graphs(runner._advance, Tape.record)
        return runner

    return make_runner


@pytest.fixture
def plain(make_runner: MakeRunner) -> dict[int, list[Frame]]:
    return mixed_load(make_runner(batch_buckets=False))


@pytest.mark.parametrize("warm", [True, False])
def test_replayed_frames_are_the_plain_ones(make_runner: MakeRunner, plain: dict[int, list[Frame]], warm: bool) -> None:
    runner = make_runner(graphs=True)
    if warm:
        runner.warm_up()
    assert mixed_load(runner) == plain
    assert len({frame for frames in plain.values() for frame in frames}) > 30


def test_a_warm_runner_meets_no_new_shape(make_runner: MakeRunner) -> None:
    runner = make_runner(graphs=True)
    runner.warm_up()
    recordings = runner.graphs.recordings
    assert recordings == 3 * 2 * 2  # rows 1, 2, 4; 256 or 512 positions; the best or the 64 best
    heard = mixed_load(runner)
    assert runner.graphs.recordings == recordings
    assert runner.graphs.replays >= max(map(len, heard.values()))
    runner.warm_up()
    assert runner.graphs.recordings == recordings


def test_compiled_frames_are_the_plain_ones_and_nothing_is_compiled_after_the_warm_up(
    make_runner: MakeRunner, plain: dict[int, list[Frame]]
) -> None:
    runner = make_runner(slots=2, compile=True)
    runner.warm_up()
    assert runner.compiler is not None
    # All layers of a stack share one compilation: per number of rows, two lengths of the backbone and two of the depth
    # decoder's passes; the noise; and the draw, whose first codebook's logits are laid out otherwise.
    assert 0 < runner.compiler.compilations <= 2 * (2 + 2 + 1 + 2)
    before = runner.compiler.compilations
    with ThreadPoolExecutor(1) as thread:  # as the engine does: warmed up by one thread, used by another
        assert thread.submit(mixed_load, runner).result() == plain
    assert runner.compiler.compilations == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_inductor_makes_of_it_is_the_same(
    tiny_model: CSM, tiny_codec: Codec, plain: dict[int, list[Frame]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csm_core.engine.runner.Compiler", Compiler)
    runner = Runner(tiny_model, tiny_codec, EngineConfig(slots=4, compile=True))
    runner.warm_up()
    assert mixed_load(runner) == plain


def test_a_recording_before_its_time_moves_nobody(make_runner: MakeRunner) -> None:
    """Without a warm-up a shape is recorded, and run for practice, while requests are under way."""
    alone, runner = make_runner(), make_runner(graphs=True)
    wish = request(3, 20)
    start(alone, 0, wish)
    wanted = [alone.step([0]).frames()[0] for _ in range(6)]
    start(runner, 0, wish)
    heard = [runner.step([0]).frames()[0] for _ in range(2)]
    for slot in (1, 3):
        start(runner, slot, request(slot, 300))
        heard += [runner.step([0, slot]).frames()[0] for _ in range(2)]
    assert heard == wanted
    assert runner.graphs.recordings == 3


def test_a_replay_does_not_overwrite_what_was_not_read(make_runner: MakeRunner) -> None:
    alone, runner = make_runner(slots=1), make_runner(slots=1, graphs=True)
    for each in (alone, runner):
        start(each, 0, request(3, 20))
    steps = [runner.step([0]) for _ in range(3)]
    assert [step.frames() for step in steps] == [alone.step([0]).frames() for _ in range(3)]


def test_graphs_count_and_replay() -> None:
    total, calls = torch.zeros(()), []

    def function(amount: int) -> torch.Tensor:
        calls.append(amount)
        total.add_(amount)
        return total * 2

    graphs: Graphs[int] = Graphs(function, Tape.record)
    assert 5 not in graphs
    graphs.prepare(5)
    total.zero_()
    assert [graphs(5).item() for _ in range(3)] == [10, 20, 30]
    assert (graphs.recordings, graphs.replays) == (1, 3)
    assert 5 in graphs
    recorded = len(calls)
    graphs(5)
    assert len(calls) == recorded  # the function itself is not called any more


def test_without_a_recorder_the_function_is_called() -> None:
    calls: list[str] = []

    def function(shape: str) -> torch.Tensor:
        calls.append(shape)
        return torch.ones(())

    graphs: Graphs[str] = Graphs(function, None)
    graphs.prepare("a")
    graphs("a")
    assert calls == ["a", "a"]
    assert (graphs.recordings, graphs.replays) == (1, 1)


def test_the_tape_sees_the_host_asking() -> None:
    with pytest.raises(AssertionError, match="host"):
        Tape.record(lambda: torch.ones(2) * (1 if torch.ones(()).item() else 2))


@pytest.mark.parametrize("switch", ["graphs", "compile"])
def test_shapes_need_buckets(switch: str) -> None:
    with pytest.raises(ValueError, match="batch_buckets"):
        EngineConfig(batch_buckets=False, **{switch: True})  # type: ignore[arg-type]


# ---- on CUDA


@pytest.fixture
def on_cuda(tiny_model: CSM, tiny_codec_state: dict[str, torch.Tensor], tiny_codec: Codec) -> MakeRunner:
    model = CSM(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    model.eval().requires_grad_(False).cuda()
    codec = Codec(tiny_codec.config, tiny_codec_state, "cuda")
    return lambda **switches: Runner(model, codec, EngineConfig(slots=4, **switches))


@pytest.mark.gpu
def test_cuda_graphs_change_no_code(on_cuda: MakeRunner) -> None:
    wanted = mixed_load(on_cuda(graphs=False))
    for switches in ({"graphs": True}, {"graphs": True, "compile": True}):
        runner = on_cuda(**switches)
        assert isinstance(runner.graphs._record, CudaRecorder)
        runner.warm_up()
        recordings = runner.graphs.recordings
        assert mixed_load(runner) == wanted
        assert runner.graphs.recordings == recordings


@pytest.mark.gpu
def test_a_frame_has_three_launches_and_no_sync(on_cuda: MakeRunner) -> None:
    runner = on_cuda(graphs=True)
    runner.warm_up()
    start(runner, 0, request(1, 40))
    runner.step([0]).frames()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=[*activities, torch.profiler.ProfilerActivity.CUDA]) as profile:
        step = runner.step([0])
    names = [event.name for event in profile.events()]
    calls = [name for name in names if name.startswith(("cudaLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaEventRec"))]
    assert len(calls) <= 3
    assert not [name for name in names if "Synchronize" in name and "cudaDeviceSynchronize" not in name]
    assert len(step.frames()) == 1
