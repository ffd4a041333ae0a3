"""Loading with fewer bytes per weight and into limited memory: what is asked for, allowed, and refused."""

import json
import logging
import shutil

import pytest
import torch

from csm_core import generator as generator_module
from csm_core import loading
from csm_core.config import EngineConfig, Profile, Quantization, Settings
from csm_core.errors import CsmError, InsufficientMemoryError, InvalidInputError
from csm_core.generator import load
from csm_core.model.quantize import DEFAULT_ON_CPU, choose, layers_for, quantize

CPU = torch.device("cpu")
TEXT = "Hello there."
needs_default = pytest.mark.skipif(DEFAULT_ON_CPU not in layers_for(CPU), reason="not on this CPU")


def with_defaults(checkpoint, folder, **defaults):
    """A copy of a native checkpoint with other defaults in its config.json."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["defaults"].update(defaults)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return str(folder)


@pytest.mark.parametrize("how", [mode for mode in ("int8:depth", "bf16") if mode[:4] in layers_for(CPU)])
def test_a_quantised_model_speaks_and_says_how_it_is_kept(how, tiny_checkpoint, caplog, monkeypatch):
    kept = []
    monkeypatch.setattr(generator_module, "quantize", lambda *model: kept.append(quantize(*model)))
    with (
        caplog.at_level(logging.INFO, "csm_core"),
        load(str(tiny_checkpoint), "cpu", Settings(quantize=how)) as speaker,
    ):
        assert len(speaker.generate_codes(TEXT, seed=1))
    assert not isinstance(kept[0].projection, torch.nn.Linear)
    assert f"cpu (as asked), {how}" in caplog.text
    assert "GB: weights" in caplog.text


def test_a_small_model_is_left_as_it_is_unless_asked(tiny_checkpoint, tiny_generator, caplog):
    wanted = tiny_generator.generate_codes(TEXT, seed=1)
    for asked in (None, "off"):
        with load(str(tiny_checkpoint), "cpu", Settings(quantize=asked)) as generator:
            assert torch.equal(generator.generate_codes(TEXT, seed=1), wanted)


@needs_default
def test_a_large_model_on_the_cpu_has_16_bits(tiny_checkpoint, tiny_generator, monkeypatch, caplog):
    monkeypatch.setattr(loading, "SMALL_MODEL", 0)
    with caplog.at_level(logging.INFO, "csm_core"), load(str(tiny_checkpoint), "cpu") as generator:
        assert len(generator.generate_codes(TEXT, seed=1))
    assert f"cpu (as asked), {DEFAULT_ON_CPU}" in caplog.text


def test_a_mode_that_breaks_the_voice_is_refused(tiny_checkpoint, tmp_path):
    fragile = with_defaults(tiny_checkpoint, tmp_path / "fragile", quantize=["fp16", "int8:depth"])
    load(fragile, "cpu", Settings(quantize="int8:depth")).close()
    for mode in ("int8", "int4:depth"):
        with pytest.raises(InvalidInputError, match=rf"tiny does not survive {mode}; it does: fp16, int8:depth"):
            load(fragile, "cpu", Settings(quantize=mode))


def test_what_a_profile_allows():
    int4, depth = Quantization("int4"), Quantization("int4", "depth")
    assert Profile("judged by nobody").allows(int4)
    assert Profile("whole", quantize=("int4",)).allows(depth)
    assert Profile("half", quantize=("int4:depth",)).allows(depth)
    assert not Profile("half", quantize=("int4:depth",)).allows(int4)
    assert not Profile("none", quantize=()).allows(depth)
    with pytest.raises(InvalidInputError, match="it does: off"):
        choose("int8", Profile("none", quantize=()), CPU, large=True)


def test_nothing_is_chosen_that_the_device_cannot():
    with pytest.raises(InvalidInputError, match="no fp8 on cpu here") as caught:
        choose("fp8", Profile("any"), CPU, large=False)
    assert caught.value.param == "quantize"
    assert choose(None, Profile("any"), CPU, large=False) is None
    assert choose(None, Profile("any"), torch.device("mps"), large=True) is None
    assert choose("off", Profile("any"), CPU, large=True) is None
    assert choose("int8:depth", Profile("any"), CPU, large=True) == Quantization("int8", "depth")


@needs_default
def test_the_default_too_is_only_for_a_voice_that_survives_it():
    assert choose(None, Profile("any"), CPU, large=True) == Quantization(DEFAULT_ON_CPU)
    assert choose(None, Profile("fragile", quantize=()), CPU, large=True) is None


def test_what_does_not_fit_is_refused_before_the_weights_are_read(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(generator_module, "load_model", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(generator_module, "free_memory", lambda _: 10_000_000)
    settings = Settings(engine=EngineConfig(slots=400, prefix_cache_bytes=0))
    with pytest.raises(CsmError, match=r"\d+ slots would fit") as caught:
        load(str(tiny_checkpoint), "cpu", settings)
    assert isinstance(caught.value, InsufficientMemoryError)
    monkeypatch.setattr(generator_module, "free_memory", lambda _: 1000)
    with pytest.raises(InsufficientMemoryError, match="no number of slots"):
        load(str(tiny_checkpoint), "cpu")


def test_settings_know_the_modes(monkeypatch):
    assert Settings.from_env({"CSM_QUANTIZE": "int8:depth"}).quantize == "int8:depth"
    assert Settings.from_env({"CSM_QUANTIZE": ""}).quantize is None
    assert Settings(quantize="off").quantize == "off"
    for wrong in ("int7", "int8:", "int8:heads", "", "depth"):
        with pytest.raises(ValueError, match="int8, int4, fp8, fp16 or bf16"):
            Settings(quantize=wrong)
    assert str(Quantization.parse("int4:depth")) == "int4:depth"
    assert str(Quantization.parse("fp16")) == "fp16"
