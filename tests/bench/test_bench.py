"""``csm bench`` as a whole, over a real tiny model: its figures agree with each other and with what was asked.

Nothing here says how fast anything is: the machine may be busy.
"""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from csm_core import cli
from csm_core.bench.command import default_choices, read_order
from csm_core.bench.peers import load_peer, race
from csm_core.bench.recommend import Target, Trial, as_settings, best, climb, combinations, in_words, nearest, search
from csm_core.bench.report import report, table
from csm_core.bench.sections import NAMES, finite
from csm_core.bench.streams import Limits, find_streams, stage
from csm_core.bench.subject import Source, Subject
from csm_core.config import EngineConfig, Settings

Run = Callable[..., tuple[int, str, str]]
TINY = ("--random-weights", "tiny", "--device", "cpu", "--slots", "4")


@pytest.fixture
def bench(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``csm bench`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["bench", *words])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One complete run: what it wrote, what it printed, its picture."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "bench.json"), "--plot", str(folder / "bench.png")]
    out = folder / "out.txt"
    with out.open("w") as file, contextlib.redirect_stdout(file):
        code = cli.main(["bench", *TINY, "--budget", "20", "--peer", "transformers", "--voice-seconds", "4", *files])
    assert code == 0
    return json.loads((folder / "bench.json").read_text()), out.read_text(), folder / "bench.png"


def section(result: dict[str, Any], name: str) -> Any:
    """What was measured; on a machine too busy for the budget there is nothing to compare."""
    if name not in result:
        assert {item["section"]: item["reason"] for item in result["skipped"]}[name]
        pytest.skip(f"no time for {name}")
    return result[name]


# --- a complete run --------------------------------------------------------------------------------------------------


def test_everything_was_measured_or_says_why_not(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, _ = measured
    skipped = {item["section"]: item["reason"] for item in result["skipped"]}
    assert {name for name in NAMES if name in result} | set(skipped) == set(NAMES)
    late = {name for name, reason in skipped.items() if reason == "the budget of 20 s is used up"}
    assert set(skipped) - late <= {"speech", "launches"}  # random weights have nothing to say; a profile takes a while
    assert all(f"{name}: {reason}" in printed for name, reason in skipped.items())
    assert "floor" in result


def test_figures_say_where_they_are_from(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, _ = measured
    about = result["about"]
    assert (about["model"], about["weights"], about["device"]) == ("random tiny", "float32", "cpu")
    assert about["command"].startswith("csm bench --random-weights tiny --device cpu --slots 4 --budget 20")
    assert about["settings"]["slots"] == 4
    for word in (about["machine"], about["torch"], f"{about['threads']} threads", about["command"]):
        assert word in printed


def test_batches_agree_with_themselves(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, _ = measured
    rows = section(result, "batch")["rows"]
    assert [row["callers"] for row in rows] == [1, 2, 4]
    for row in (row for row in rows if "skipped" not in row):
        assert row["frames_per_second"] == pytest.approx(1000 * row["callers"] / row["ms_per_frame"])
        assert row["times_real_time"] == pytest.approx(row["frames_per_second"] / 12.5)
        assert row["times_floor"] == pytest.approx(row["ms_per_frame"] / row["floor_ms"])
        assert row["rtf"]["p50"] <= row["rtf"]["p95"] <= row["rtf"]["p99"]
        assert row["rtf"]["n"] == row["ttfa_ms"]["n"] == row["callers"]
        assert row["failed"] == 0
        # A speech's time is its first sound and its frames; other callers' prefill is in between.
        audio_ms = 80 * result["batch"]["frames"]
        assert row["rtf"]["p99"] * audio_ms >= row["ttfa_ms"]["p50"]
        assert row["rtf"]["p99"] * audio_ms >= 0.5 * row["ms_per_frame"] * (result["batch"]["frames"] - 1)
    floor = result["floor"]
    assert floor["total_bytes"] == sum(floor["bytes_per_frame"].values())
    assert floor["ms"] == pytest.approx(1000 * floor["total_bytes"] / floor["bandwidth"])
    assert "x real time" in printed


def test_ttfa_with_and_without_a_known_voice(measured: tuple[dict[str, Any], str, Path]) -> None:
    found = section(measured[0], "ttfa")
    assert found["voice_seconds"] == 4
    for name in ("no_voice", "new_voice", "known_voice"):
        assert 0 < found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"]
        assert found[name]["n"] >= 3


def test_streams_are_those_that_held(measured: tuple[dict[str, Any], str, Path]) -> None:
    found = section(measured[0], "streams")
    held = [row["streams"] for row in found["stages"] if row["holds"]]
    assert found["streams"] == max(held, default=0)
    for row in found["stages"]:
        assert row["requests_per_second"] * 4 == pytest.approx(row["streams"])  # speeches last 4 s on average
        if row["holds"]:
            assert row["ttfa_ms"]["p95"] <= found["ttfa_limit_ms"] == 300
            assert (row["failed"], row["smooth"] >= found["continuity"]) == (0, True)
        elif row["requests"]:
            late = row["ttfa_ms"]["p95"] is None or row["ttfa_ms"]["p95"] > 300
            assert late or row["failed"] or row["smooth"] < found["continuity"]


def test_memory_is_counted(measured: tuple[dict[str, Any], str, Path], subject: Subject) -> None:
    found = section(measured[0], "memory")
    assert found["planned"]["weights"] == 4 * subject.parameters
    assert found["planned"]["slots"] > 0
    assert found["planned"]["weights"] < found["rss"] <= 1.1 * found["rss_peak"]


def test_parts_add_up(measured: tuple[dict[str, Any], str, Path]) -> None:
    for row in section(measured[0], "parts")["rows"]:
        parts = sum(row[name] for name in ("backbone", "depth", "heads", "sampling", "codec", "rest"))
        assert parts == pytest.approx(row["frame_ms"])


def test_the_picture_is_a_png(measured: tuple[dict[str, Any], str, Path]) -> None:
    data = measured[2].read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


# --- words -----------------------------------------------------------------------------------------------------------


def test_only_some_sections(bench: Run) -> None:
    code, out, err = bench(*TINY, "--only", "floor,memory", "--set", "chunk_schedule=2,4", "--progress")
    assert code == 0
    assert "chunk_schedule=2,4, " in out
    assert ("floor:" in out, "memory" in out, "batch:" in out) == (True, True, False)
    assert "measuring: floor" in err
    assert not list(Path().iterdir())


def test_the_budget_is_kept(bench: Run) -> None:
    code, out, _ = bench(*TINY, "--only", "batch,parts,peers", "--budget", "0")
    assert code == 0
    assert out.count("the budget of 0 s is used up") == 3


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--random-weights", "huge"], "csm-1b, small, tiny"),
        ([*TINY, "--only", "floor,roof"], "roof"),
        ([*TINY, "--set", "slotz=1"], "slots"),
        ([*TINY, "--set", "slots=0"], "slots"),
        ([*TINY, "--slots", "-1"], "slots"),
        ([*TINY, "--device", "abacus"], "device"),
        ([*TINY, "--json", "no/such/file.json"], "cannot be written"),
        ([*TINY, "--plot", "no/such/file.png"], "cannot be written"),
        ([*TINY, "--cores", "0"], "cores"),
    ],
)
def test_bad_words_are_a_sentence(bench: Run, words: list[str], complaint: str) -> None:
    code, out, err = bench(*words)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.startswith("csm: ")
    assert err.count("\n") == 1


def test_without_matplotlib_it_is_said_before_measuring(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "csm_core.bench.plot", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = bench(*TINY, "--plot", "x.png")
    assert (code, out) == (1, "")
    assert "csm-core[bench" in err


def test_a_peer_that_is_not_installed_is_a_line(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtune", None)
    monkeypatch.delitem(sys.modules, "csm_core.bench.peer_sesame", raising=False)
    code, out, _ = bench(*TINY, "--only", "peers", "--peer", "sesame")
    assert code == 0
    assert "peer sesame: not installed: it needs torchtune" in out


def test_slots_by_device_and_by_word() -> None:
    def order(*words: str) -> Any:
        args = cli.arguments.read(["bench", *words])
        args.settings, args.argv = Settings(), ["csm", "bench", *words]
        return read_order(args)

    assert order("--device", "cpu").settings.engine.slots == 8
    assert order("--device", "cpu", "--slots", "3").settings.engine.slots == 3
    assert order("--device", "cpu", "--set", "slots=5").settings.engine.slots == 5
    assert order("--device", "cpu", "--dtype", "bfloat16").source.dtype == torch.bfloat16
    assert default_choices(order("--device", "cpu"))["chunk_schedule"][0] == EngineConfig().chunk_schedule


# --- the bundled voice -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_voice_alone_and_with_others(bench: Run) -> None:
    """The whole way through Generator.stream; a JSON of it can be reported again."""
    words = ["--model", "bundled", "--device", "cpu", "--slots", "2", "--only", "batch,speech", "--budget", "20"]
    code, out, _ = bench(*words, "--json", "voice.json")
    assert code == 0
    result = json.loads(Path("voice.json").read_text())
    assert set(result["speech"]) == {"callers_1", "callers_2"}
    for heard in (row for row in result["speech"].values() if "skipped" not in row):
        assert heard["failed"] == 0
        assert heard["audio_seconds"] > heard["requests"]  # sentences, not clicks
        assert 0 < heard["ttfa_ms"]["p50"] <= heard["ttfa_ms"]["p95"]
    assert report(result) + "\n" == out


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_limit_that_nobody_keeps_and_one_that_everybody_keeps(subject: Subject) -> None:
    with subject.engine() as engine:
        none = find_streams(engine, subject, 40.0, 8.0, Limits(ttfa_ms=0.0))
        assert none["streams"] == 0
        assert sum(bool(row["requests"]) for row in none["stages"]) == 1
        assert not any(row["holds"] for row in none["stages"])
        easy = stage(engine, subject, 8.0, 2.0, Limits(ttfa_ms=1e9))
        assert easy["requests"] > 0
        assert easy["holds"] == (easy["with_underruns"] == easy["failed"] == 0)  # a busy machine may fail even that


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformers", "sesame"])
def test_a_peer_says_the_same_from_the_same_weights(name: str, subject: Subject) -> None:
    """Greedy, in fp32: so it is the same model that is timed, and the same prompt."""
    pytest.importorskip({"sesame": "torchtune"}.get(name, name))
    found = race(subject, {name: load_peer(name, subject)}, seconds=1.0)
    ours, theirs = found["contenders"]["csm_core"], found["contenders"][name]
    assert theirs["same_codes"] == 1.0
    assert ours["times_ours"] == 1.0
    assert len(ours["rounds"]) == len(theirs["rounds"]) == 3
    assert theirs["version"]


def test_another_model_is_noticed(subject: Subject) -> None:
    pytest.importorskip("transformers")
    other = Source(random_weights="tiny", device="cpu").build(Settings())
    with torch.no_grad():
        other.model.codebook0_head.weight.neg_()
    found = race(subject, {"transformers": load_peer("transformers", other)}, seconds=0.1)
    assert found["contenders"]["transformers"]["same_codes"] < 0.9


# --- recommendations -------------------------------------------------------------------------------------------------


def trial(callers: int, rtf: float, ttfa: float, gaps: int = 0, **values: Any) -> Trial:
    return Trial(values, callers, rtf, ttfa, gaps, 0)


def test_the_best_of_what_meets_the_target() -> None:
    target = Target(rtf=0.9, ttfa_ms=200)
    slow, late, gaps = trial(8, 0.95, 100), trial(8, 0.5, 201), trial(8, 0.5, 100, gaps=1)
    few, lossy, exact, exact_later = (
        trial(2, 0.1, 10),
        trial(4, 0.3, 50, quantize="int8"),
        trial(4, 0.8, 150, quantize=None),
        trial(4, 0.8, 160, quantize=None),
    )
    assert best([slow, late, gaps, few, lossy, exact_later, exact], target) is exact
    assert best([slow, late, gaps, few, lossy], target) is lossy
    assert best([slow, late, gaps], target) is None
    assert best([], target) is None
    assert nearest([slow, late], target) is late


def test_callers_are_doubled_until_it_breaks() -> None:
    def measure(callers: int) -> Trial:
        return trial(callers, callers * 0.1, 10)

    def tried(slots: int, rtf: float) -> list[int]:
        return [t.callers for t in climb(slots, measure, Target(rtf, 300))]

    assert tried(16, 0.45) == [1, 2, 4, 8]  # 8 breaks it
    assert tried(6, 9.9) == [1, 2, 4, 6]
    assert tried(1, 9.9) == [1]
    assert tried(8, 0.05) == [1]


def test_combinations_change_the_first_least() -> None:
    found = list(combinations({"quantize": [None, "int8"], "chunk_schedule": [(1,), (2,)]}))
    assert [tuple(values.values()) for values in found] == [(None, (1,)), (None, (2,)), ("int8", (1,)), ("int8", (2,))]


@pytest.fixture
def opened(subject: Subject) -> Any:
    @contextlib.contextmanager
    def open_(settings: Settings) -> Iterator[Any]:
        chosen = Subject(subject.name, subject.model, subject.codec, settings, subject.profile, subject.codec_bytes)
        with chosen.engine() as engine:
            yield chosen, engine

    return open_


def test_the_search_picks_from_real_runs(opened: Any, subject: Subject) -> None:
    """A first chunk of forty frames cannot come as soon as one of one; nothing comes within a microsecond."""
    choices = {"chunk_schedule": [(40,), (1, 40)]}
    found = search(opened, subject.settings, choices, Target(rtf=1e9, ttfa_ms=1e9), budget=600)
    assert {t.callers for t in found["trials"]} >= {1}
    smooth = [t for t in found["trials"] if not t.with_underruns]
    if found["recommended"] is None:  # on a very busy machine all of them may have had a gap
        assert not smooth
    else:
        assert found["recommended"] in smooth
        assert found["recommended"].callers == max(t.callers for t in smooth)
    first = {t.values["chunk_schedule"]: t for t in found["trials"] if t.callers == 1}
    assert first[(1, 40)].ttfa_ms < first[(40,)].ttfa_ms

    hopeless = search(opened, subject.settings, choices, Target(ttfa_ms=0.001), budget=600)
    assert hopeless["recommended"] is None
    assert [t.callers for t in hopeless["trials"]] == [1, 1]
    assert hopeless["nearest"] in hopeless["trials"]

    short = search(opened, subject.settings, choices, Target(), budget=0)
    assert [values["chunk_schedule"] for values in short["not_tried"]] == [(1, 40)]


def test_recommendations_in_words() -> None:
    settings = as_settings(Settings(), trial(4, 0.1, 10, chunk_schedule=(2, 4)))
    assert settings.engine == EngineConfig(slots=4, chunk_schedule=(2, 4))
    words = in_words(settings)
    assert words["options"] == "--set slots=4 --set chunk_schedule=2,4"
    assert eval(words["python"], {"Settings": Settings, "EngineConfig": EngineConfig}) == settings
    assert in_words(Settings())["python"] == "Settings(engine=EngineConfig())"


def test_recommend_from_the_command_line(bench: Run) -> None:
    words = [*TINY, "--slots", "1", "--recommend", "--try", "chunk_schedule=1,2|4"]
    code, out, _ = bench(*words, "--target-rtf", "1000", "--target-ttfa-ms", "100000", "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert code == (0 if found["recommended"] else 1)
    assert [t["values"]["chunk_schedule"] for t in found["trials"]] == [[1, 2], [4]]
    assert found["use"]["python"] in out
    code, out, _ = bench(*words, "--target-ttfa-ms", "0.001")
    assert code == 1
    assert "nothing that was tried meets the target" in out


# --- text ------------------------------------------------------------------------------------------------------------


def test_numbers_that_json_does_not_have() -> None:
    assert finite({"a": [math.inf, 1.5, math.nan], "b": (1, "x"), "c": torch.float32}) == {
        "a": [None, 1.5, None],
        "b": [1, "x"],
        "c": "torch.float32",
    }


def test_tables() -> None:
    assert table(("name", "ms"), [("a", 1234.5), ("long name", 0.12345), ("none", None), ("inf", math.inf)]) == (
        "  name          ms\n  a          1,234\n  long name  0.123\n  none           -\n  inf            -"
    )
