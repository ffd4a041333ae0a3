"""A tiny model with random weights, as ``csm bench --random-weights tiny`` builds it."""

import pytest

from csm_core.bench.subject import Source, Subject
from csm_core.config import EngineConfig, Settings


@pytest.fixture(scope="session")
def subject() -> Subject:
    return Source(random_weights="tiny", device="cpu").build(Settings(engine=EngineConfig(slots=4)))
