"""Settings as values: round trips, unknown keys, the environment, impossible numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from csm_core.config import (
    BUNDLED_CODEC,
    CSM_1B,
    MIMI,
    CodecConfig,
    EngineConfig,
    ModelConfig,
    Profile,
    Settings,
)


@pytest.mark.parametrize("config", [CSM_1B, dataclasses.replace(CSM_1B, rope_scaling=None)])
def test_model_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("config", [MIMI, BUNDLED_CODEC])
def test_codec_round_trip(config: CodecConfig) -> None:
    assert CodecConfig.from_dict(config.to_dict()) == config
    assert isinstance(config.to_dict()["ratios"], list)  # JSON has no tuples
    assert config.frame_size == 1920


@pytest.mark.parametrize("read", [CSM_1B.from_dict, MIMI.from_dict])
def test_unknown_keys_are_refused(read: Any) -> None:
    values = (CSM_1B if read == CSM_1B.from_dict else MIMI).to_dict()
    with pytest.raises(TypeError, match="speed"):
        read({**values, "speed": 2})


def test_profile_from_a_checkpoints_defaults() -> None:
    profile = Profile.from_defaults("voice", {"temperature": 0.5, "speakers": [0, 1], "spell_out": True})
    assert profile == Profile("voice", temperature=0.5, spell_out=True, speakers=(0, 1))
    assert Profile.from_defaults("voice", {}) == Profile("voice")
    with pytest.raises(TypeError, match="pitch"):
        Profile.from_defaults("voice", {"pitch": 1})


def test_settings_from_an_empty_environment() -> None:
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"CSM_MODEL": "", "CSM_DEVICE": "", "CSM_VOICES": "", "CSM_LOG_LEVEL": ""}) == Settings()


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"CSM_MODEL": "a/b", "CSM_DEVICE": "cuda:1", "CSM_VOICES": "voices", "CSM_LOG_LEVEL": "debug"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert Settings.from_env() == Settings("a/b", "cuda:1", Path("voices"), "DEBUG")


def test_an_unknown_log_level_is_refused() -> None:
    with pytest.raises(ValueError, match="CSM_LOG_LEVEL"):
        Settings.from_env({"CSM_LOG_LEVEL": "loud"})


@pytest.mark.parametrize(
    "values",
    [
        {"slots": 0},
        {"queue_size": -1},
        {"repeat_limit": 1},
        {"chunk_schedule": ()},
        {"chunk_schedule": (1, 0)},
        {"prefill_piece": 0},
        {"prefix_cache_bytes": -1},
        {"lookahead": 2},
    ],
)
def test_engines_that_cannot_run(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"EngineConfig|chunk_schedule"):
        EngineConfig(**values)


@pytest.mark.parametrize(("slots", "sizes"), [(1, [1]), (5, [1, 2, 4, 4, 5]), (8, [1, 2, 4, 4, 8, 8, 8, 8])])
def test_batches_double_up_to_all_slots(slots: int, sizes: list[int]) -> None:
    assert [EngineConfig(slots=slots).bucket(rows) for rows in range(1, slots + 1)] == sizes


@pytest.mark.parametrize("config", [MIMI, Settings(), EngineConfig(), Profile("x")])
def test_settings_are_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)
