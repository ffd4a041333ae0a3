"""Servers over a tiny real generator: in process, or live on a free port of 127.0.0.1 with real connections."""

import pytest
from starlette.testclient import TestClient

from csm_core.config import EngineConfig, Profile, Settings
from csm_core.generator import Generator
from csm_core.server.app import create_app
from csm_core.text import TextTokenizer, character_tokenizer
from tests.server.live_server import OPEN, serving

ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789[].,?!'"


@pytest.fixture
def make_generator(tiny_model, tiny_codec):
    """Generators of a tiny model, by engine settings; all are closed in the end."""
    made = []

    def make(codec=tiny_codec, **engine):
        tokenizer = TextTokenizer(character_tokenizer(ALPHABET), tiny_model.config.bos_id, tiny_model.config.eos_id)
        profile = Profile("tiny", temperature=0.8, top_k=20, max_chars=60, spell_out=True, speakers=(0, 1))
        made.append(Generator(tiny_model, codec, tokenizer, profile, Settings(engine=EngineConfig(**engine))))
        return made[-1]

    yield make
    for generator in made:
        generator.close()


@pytest.fixture
def generator(make_generator):
    return make_generator(slots=2)


@pytest.fixture
def client(generator):
    """A client of an open server, in process. What the server does not foresee is an answer 500, as outside."""
    with TestClient(create_app(OPEN, generator), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def live(generator):
    app = create_app(OPEN, generator)
    with serving(app) as url:
        yield url, app.state.desk
