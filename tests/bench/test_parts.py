"""The pieces that a bench is made of: subjects, the floor's arithmetic, counts of a profile, switches, the machine."""

import re
from dataclasses import replace

import pytest
import torch

from csm_core.bench import machine, switches
from csm_core.bench.floor import frame_bytes
from csm_core.bench.parts import part_times
from csm_core.bench.subject import BLOCK, PRESETS, Source, Subject
from csm_core.bench.trace import Seen, count, make_profiler, seen, trace
from csm_core.bench.traffic import closed_loop
from csm_core.config import CSM_1B, MIMI, EngineConfig, Quantization, Settings
from csm_core.engine.memory import Precision
from csm_core.errors import EngineError, InvalidInputError

CPU = torch.device("cpu")

# --- subjects --------------------------------------------------------------------------------------------------------


def test_random_weights_are_those_of_bf16_and_repeat(subject: Subject) -> None:
    again = Source(random_weights="tiny", device="cpu", dtype=torch.bfloat16).build(Settings())
    assert again.dtype == torch.bfloat16
    weights = subject.model.state_dict()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight.float(), weights[name]), name
    gate = weights["backbone.layers.0.mlp.gate_proj.weight"]
    assert gate.std() == pytest.approx(0.02, rel=0.1)
    assert len(gate.unique(dim=0)) == len(gate)
    assert subject.parameters == sum(weight.numel() for weight in subject.model.parameters())
    assert (BLOCK % 2, BLOCK % 3, BLOCK % 5, BLOCK % 7) != (0, 0, 0, 0)


def test_presets() -> None:
    assert PRESETS["csm-1b"] == (CSM_1B, MIMI)
    for shape, codec in PRESETS.values():
        assert (shape.num_codebooks, shape.codebook_size) == (codec.num_codebooks, codec.codebook_size)
        assert shape.max_seq_len >= 512
    with pytest.raises(InvalidInputError, match="csm-1b, small, tiny"):
        Source(random_weights="huge", device="cpu").build(Settings())


def test_prompts(subject: Subject) -> None:
    plain, other = subject.prompt(1), subject.prompt(2)
    assert plain.shape == other.shape == (40, 4)
    assert not torch.equal(plain, other)
    assert torch.equal(plain, subject.prompt(1))
    voiced = subject.prompt(1, voice_frames=30, voice=5)
    assert voiced.shape == (40 + 30 + 1 + 40, 4)
    assert torch.equal(voiced[-40:], plain)
    assert torch.equal(voiced[:71], subject.prompt(9, voice_frames=30, voice=5)[:71])
    assert not torch.equal(voiced[:71], subject.prompt(1, voice_frames=30, voice=6)[:71])
    assert 0 <= int(plain[:, -1].min()) <= int(plain[:, -1].max()) < 64 - 4  # a peer's placeholders are not among them


def test_a_speech_has_the_length_that_was_asked_for() -> None:
    """The bundled voice, which knows when it is done, does not end before."""
    voice = Source("bundled", device="cpu").build(Settings())
    assert (voice.name, voice.tokenizer is None) == ("bundled", False)
    params = voice.params(60)
    assert (params.max_frames, params.min_frames, params.temperature) == (60, 60, 0.0)
    assert voice.params(60, temperature=0.5).temperature == 0.5


# --- the floor -------------------------------------------------------------------------------------------------------


def test_bytes_of_a_csm_1b_frame() -> None:
    """The figures that were worked out by hand: 9.11 GB in bf16, 33.6 MB of cache at 1024 positions."""
    found = frame_bytes(CSM_1B, Precision(2), positions=1024)
    assert found["backbone"] == pytest.approx(2 * 973.1e6, rel=1e-3)
    assert found["depth"] == pytest.approx(2 * 31 * (111.15e6 + 2.1e6), rel=1e-3)
    assert found["heads"] == pytest.approx(2 * (4.2e6 + 65.1e6), rel=1e-3)
    assert found["kv"] == pytest.approx(33.6e6, rel=1e-2)
    assert sum(found.values()) - found["kv"] == pytest.approx(9.11e9, rel=1e-3)


def test_the_bytes_of_a_frame_are_those_of_the_matrices(subject: Subject) -> None:
    """The same from the tensors themselves."""

    def matrices(module: torch.nn.Module) -> int:
        return sum(weight.nbytes for weight in module.parameters() if weight.ndim > 1)

    model = subject.model
    assert frame_bytes(model.config, subject.precision) == {
        "backbone": matrices(model.backbone),
        "depth": 2 * (matrices(model.depth) + matrices(model.projection)),
        "heads": matrices(model.codebook0_head) + model.audio_head.nbytes,
        "kv": 0,
    }


def test_weights_are_read_once_and_caches_by_every_stream() -> None:
    one, four = frame_bytes(CSM_1B, Precision(4), 1, 100), frame_bytes(CSM_1B, Precision(4), 4, 100)
    assert four == {**one, "kv": 4 * one["kv"]}
    assert frame_bytes(CSM_1B, Precision(2), 1, 100) == {name: size / 2 for name, size in one.items()}


def test_packed_weights_are_fewer_bytes() -> None:
    """4.55 GB in int8, as worked out by hand, and 2.8 GB in int4 with its groups' scales; the cache stays."""
    bf16 = frame_bytes(CSM_1B, Precision(2), 1, 100)
    int8 = frame_bytes(CSM_1B, Precision(2, Quantization("int8")), 1, 100)
    int4 = frame_bytes(CSM_1B, Precision(2, Quantization("int4")), 1, 100)
    depth = frame_bytes(CSM_1B, Precision(2, Quantization("int8", "depth")), 1, 100)
    assert sum(int8.values()) - int8["kv"] == pytest.approx(4.55e9, rel=0.02)
    assert sum(int4.values()) - int4["kv"] == pytest.approx(4.553e9 * 0.625, rel=0.02)
    assert (depth["backbone"], depth["depth"], depth["kv"]) == (bf16["backbone"], int8["depth"], bf16["kv"])
    assert int8["heads"] < depth["heads"] < bf16["heads"]


def test_a_quantised_subject_says_so() -> None:
    found = Source(random_weights="small", device="cpu").build(Settings(quantize="int8"))
    assert found.weights.startswith("int8 (")
    before = found.parameters
    found.quantize()
    assert found.parameters == before
    with found.engine(slots=1) as engine:
        assert closed_loop(engine, lambda n: (found.prompt(n), found.params(3)), 1)[0].frames == 3


# --- counts ----------------------------------------------------------------------------------------------------------


def test_events_are_counted_per_frame() -> None:
    events = [
        *[Seen("aten::linear", leaf=False), Seen("aten::mm", leaf=True)] * 4,
        *[Seen("aten::view", leaf=True), Seen("aten::empty", leaf=True)] * 9,
        *[Seen("cudaLaunchKernel", True), Seen("cudaLaunchKernelExC", True), Seen("cuLaunchKernelEx", True)] * 2,
        *[Seen("cudaGraphLaunch", True), Seen("cudaMemcpyAsync", True), Seen("cudaEventSynchronize", True)] * 2,
        *[Seen("aten::item", False), Seen("aten::_local_scalar_dense", True)] * 6,
        *[Seen("void gemv<bf16>(int)", True, device_seconds=0.001)] * 10,
    ]
    assert count(events, frames=2) == {
        "operations": 2 + 3,
        "kernel_launches": 3,
        "graph_launches": 1,
        "copies": 1,
        "waits": 1,
        "reads": 3,
        "device_ms": pytest.approx(5),
    }


def test_operations_of_a_known_program() -> None:
    x = torch.ones(4, 4)
    with make_profiler(CPU) as profiler:
        for _ in range(3):
            ((x @ x).view(2, 8).t() + 1).sum().item()
    found = count(seen(profiler), 3)
    assert found["operations"] == 4  # mm, add, sum, and the read itself
    assert found["reads"] == 1
    assert found["kernel_launches"] == found["waits"] == found["device_ms"] == 0


def test_a_frame_of_an_engine_is_traced(subject: Subject) -> None:
    """Two depth passes of two layers and a backbone of two: some hundred operations, and the same again."""
    with subject.engine() as engine:
        first, again = trace(engine, subject), trace(engine, subject)
    assert first["frames"] >= 4
    assert 100 < first["operations"] < 3000
    assert first["operations"] == pytest.approx(again["operations"], rel=0.1)


def test_a_trace_of_a_closed_engine_is_an_error(subject: Subject) -> None:
    with subject.engine() as engine:
        pass
    with pytest.raises(EngineError):
        trace(engine, subject)


def test_parts_are_timed(subject: Subject) -> None:
    found = part_times(subject, batch=2, positions=40, repeats=3)
    assert set(found) == {"backbone", "depth", "heads", "sampling", "codec"}
    assert all(ms >= 0 for ms in found.values())
    assert min(found["backbone"], found["sampling"], found["codec"]) > 0


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slots=8", ("slots", 8)),
        (" slots = 8 ", ("slots", 8)),
        ("queue-size=0", ("queue_size", 0)),
        ("chunk_schedule=1,2,4", ("chunk_schedule", (1, 2, 4))),
        ("chunk_schedule=3", ("chunk_schedule", (3,))),
        ("batch_buckets=false", ("batch_buckets", False)),
        ("batch_buckets=On", ("batch_buckets", True)),
        ("lookahead=none", ("lookahead", None)),
        ("lookahead=1", ("lookahead", 1)),
    ],
)
def test_settings_by_name(text: str, expected: tuple[str, object]) -> None:
    assert switches.parse(text) == expected


@pytest.mark.parametrize("text", ["slots", "slot=8", "model=bundled", "slots=many", "chunk_schedule=1,x", "=", ""])
def test_bad_settings_are_a_sentence(text: str) -> None:
    with pytest.raises(InvalidInputError):
        switches.parse(text)


def test_settings_are_applied() -> None:
    settings = Settings(model="bundled")
    found = switches.apply(settings, [("slots", 3), ("chunk_schedule", (2, 4))])
    assert found == replace(settings, engine=replace(settings.engine, slots=3, chunk_schedule=(2, 4)))
    assert switches.current(found) | {"slots": 3, "chunk_schedule": (2, 4)} == switches.current(found)
    assert switches.parse_choices("slots=1|2|4") == ("slots", [1, 2, 4])
    with pytest.raises(InvalidInputError, match="slots"):
        switches.apply(settings, [("slots", 0)])


def test_every_field_of_the_engine_can_be_set() -> None:
    """A new switch needs no change here."""
    for name, value in switches.current(Settings()).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert switches.parse(f"{name}={text}") == (name, value)
    assert set(switches.names()) >= set(EngineConfig.__dataclass_fields__)


# --- the machine -----------------------------------------------------------------------------------------------------


def test_every_figure_says_where_it_is_from() -> None:
    facts = machine.facts(CPU, ["csm", "bench", "--only", "a b"])
    assert facts["command"] == "csm bench --only 'a b'"
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert 1 <= facts["cores"] <= 4096
    assert facts["machine"]
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|.+-g[0-9a-f]{7,}(-dirty)?", facts["commit"])
    assert machine.facts(CPU, [], "a toaster")["machine"] == "a toaster"


def test_bandwidth_and_memory_are_plausible() -> None:
    assert 1e8 < machine.bandwidth(CPU) < 1e13
    held = machine.memory(CPU)
    assert 10e6 < held["rss"] <= held["rss_peak"] * 1.1


@pytest.mark.gpu
def test_memory_and_bandwidth_of_a_gpu() -> None:
    device = torch.device("cuda")
    assert machine.bandwidth(device) > 50e9
    held = machine.memory(device)
    assert 0 <= held["device"] <= held["device_peak"] <= held["device_reserved"]
    assert machine.facts(device, [])["cuda"]


@pytest.mark.gpu
def test_a_frame_on_a_gpu_is_traced() -> None:
    subject = Source(random_weights="small", device="cuda").build(Settings())
    with subject.engine() as engine:
        found = trace(engine, subject)
    assert found["device_ms"] > 0
    assert found["kernel_launches"] + found["graph_launches"] > 0
    assert sum(part_times(subject, 1, 40, 3).values()) > 0
