"""Keys, limits and what may be listened on: who gets in, how often, with how much."""

import json
import logging
import socket
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.testclient import TestClient

from csm_core.config import ServerSettings, key_digest
from csm_core.errors import InvalidInputError
from csm_core.server.app import create_app
from csm_core.server.run import Address, check_address
from tests.server.live_server import LONG_TEXT, OPEN, serving, wait_for

KEYS = ["first-key-of-two-0001", "second-key-of-two-002"]
SPEECH = {"model": "tts-1", "input": "Hi.", "voice": "nova", "response_format": "pcm", "max_audio_length_ms": 300}
ROUTES = [
    ("POST", "/v1/audio/speech"),
    ("GET", "/v1/audio/voices"),
    ("GET", "/v1/audio/models"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tts-1"),
    ("POST", "/generate"),
    ("POST", "/generate_audio"),
    ("POST", "/v4/p/a/generate_audio"),
    ("POST", "/stream_audio"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("POST", "/health"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health/../metrics"),
]


@pytest.fixture
def app_with(generator):
    def make(**settings):
        return TestClient(create_app(ServerSettings(**settings), generator))

    return make


@pytest.fixture
def keyed(app_with):
    with app_with(keys=tuple(map(key_digest, KEYS))) as client:
        yield client


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_everything_that_is_not_on_the_list_needs_a_key(keyed, method, path):
    answer = keyed.request(method, path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


def test_every_route_of_the_application_is_looked_at(keyed):
    paths = keyed.get("/openapi.json", headers=bearer(KEYS[0])).json()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    public = {("GET", "/health"), ("GET", "/ready"), ("GET", "/ping")}
    for method, path in routes:
        assert (keyed.request(method, path).status_code == 401) == ((method, path) not in public)


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_public_routes_need_none(keyed, path):
    assert keyed.get(path).status_code == 200


def test_a_server_without_keys_lets_nobody_in(app_with):
    with app_with() as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers=bearer("")).status_code == 401
        assert client.get("/v1/models", headers=bearer(KEYS[0])).status_code == 401


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(keyed, key):
    assert keyed.post("/v1/audio/speech", json=SPEECH, headers=bearer(key)).status_code == 200
    assert keyed.get("/v1/models", headers={"authorization": f"bearer   {key} "}).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}",
     f"Bearer {KEYS[0].upper()}", f"Bearer {key_digest(KEYS[0])}", "Bearer \xe9\xff"],
)  # fmt: skip
def test_nothing_else_opens(keyed, header):
    assert keyed.get("/v1/models", headers={"authorization": header.encode("latin-1")}).status_code == 401


def test_lists_and_figures_can_be_made_public(app_with):
    with app_with(public_lists=True, public_metrics=True) as client:
        for path in ("/v1/models", "/v1/audio/models", "/v1/audio/voices", "/metrics"):
            assert client.get(path).status_code == 200
        assert client.post("/v1/audio/voices").status_code == 401
        assert client.post("/v1/audio/speech", json=SPEECH).status_code == 401


def test_keys_are_kept_as_digests_and_weak_ones_refused():
    settings = ServerSettings.from_env({"CSM_API_KEYS": f"{KEYS[0]}, sha256:{key_digest(KEYS[1]).upper()}"})
    assert settings.keys == tuple(map(key_digest, KEYS))
    assert all(key not in repr(settings) for key in KEYS)
    assert ServerSettings.from_env({}).keys == ()
    with pytest.raises(ValueError, match="16 characters"):
        ServerSettings.from_env({"CSM_API_KEYS": "short"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_an_address_others_reach_needs_a_key(host):
    with pytest.raises(InvalidInputError, match="no-auth"):
        check_address(ServerSettings(), Address(host))
    assert check_address(OPEN, Address(host)).no_auth
    keyed = ServerSettings(keys=("0" * 64,))
    assert not check_address(keyed, Address(host)).no_auth


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone_needs_none(host):
    assert check_address(ServerSettings(), Address(host)).no_auth
    assert not check_address(ServerSettings(keys=("0" * 64,)), Address(host)).no_auth


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_key_has_its_rate(app_with):
    with app_with(keys=tuple(map(key_digest, KEYS)), key_rate="3/minute") as client:
        first, second = map(bearer, KEYS)
        assert [client.get("/v1/models", headers=first).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = client.get("/v1/models", headers=first)
        assert refused.json()["error"] | {"message": ""} == {
            "message": "", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert client.get("/v1/models", headers=second).status_code == 200
        assert client.get("/health").status_code == 200
        assert client.get("/nothing", headers=first).status_code == 429


def test_a_rate_that_cannot_be_read_is_said_at_the_start(generator):
    with pytest.raises(InvalidInputError, match="often"):
        create_app(ServerSettings(key_rate="often"), generator)


def test_a_key_has_its_number_of_speeches(generator):
    settings = ServerSettings(keys=tuple(map(key_digest, KEYS)), key_speeches=1)
    app = create_app(settings, generator)
    with serving(app) as url, httpx2.Client(timeout=30) as client:
        route = url + "/v1/audio/speech"
        with client.stream(
            "POST", route, json=SPEECH | {"input": LONG_TEXT, "max_audio_length_ms": None}, headers=bearer(KEYS[0])
        ):
            refused = client.post(route, json=SPEECH, headers=bearer(KEYS[0]))
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
            assert refused.headers["retry-after"]
            assert client.post(route, json=SPEECH, headers=bearer(KEYS[1])).status_code == 200
        wait_for(lambda: not app.state.desk.running)
        assert client.post(route, json=SPEECH, headers=bearer(KEYS[0])).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_413(app_with, announced):
    def pieces():
        yield b'{"model": "'
        for _ in range(100):
            yield b"a" * 1000

    content = b"".join(pieces()) if announced else pieces()
    with app_with(no_auth=True, max_body_bytes=10_000) as client:
        answer = client.post("/v1/audio/speech", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert client.post("/v1/audio/speech", json=SPEECH).status_code == 200


def raw(url, text, then=b""):
    """The first bytes of the answer to a request as it stands."""
    with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=20) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode() + then)
        return connection.recv(4096).decode()


def test_hostile_requests_on_the_wire(generator):
    app = create_app(ServerSettings(no_auth=True, body_timeout=0.5), generator)
    head = "POST /generate HTTP/1.1\nhost: x\ncontent-type: application/json\n"
    with serving(app) as url:
        assert raw(url, head + "content-length: 4294967296\n\n").startswith("HTTP/1.1 413")
        assert raw(url, head + "content-length: " + "9" * 19 + "\n\n").startswith("HTTP/1.1 413")
        assert raw(url, head + "content-length: -1\n\n").startswith("HTTP/1.1 400")
        assert raw(url, head + "content-length: 100\n\n", b'{"text"').startswith("HTTP/1.1 408")
        assert raw(url, head + "transfer-encoding: chunked\n\n", b"5\r\n{").startswith("HTTP/1.1 408")
        assert "x-request-id: a.b-1" in raw(url, "GET /health HTTP/1.1\nhost: x\nx-request-id: a.b-1\n\n")
        assert "forged" not in raw(url, "GET /health HTTP/1.1\nhost: x\nx-request-id: forged line\n\n")
        assert httpx2.get(url + "/health").status_code == 200
        assert app.state.desk.running == 0


@pytest.mark.parametrize("kind", ["long base64", "many turns", "long audio"])
def test_audio_that_is_too_much_is_refused_before_it_is_decoded(app_with, kind):
    turns = {
        "long base64": [{"text": "a", "audio": "A" * 40_000_000}],
        "many turns": [{"text": "a", "audio": "AAAA"}] * 65,
        "long audio": [{"text": "a", "audio": "UklGR" + "A" * 1000}],
    }[kind]
    with app_with(no_auth=True, max_body_bytes=2**26) as client:
        answer = client.post("/generate_audio", content=json.dumps({"text": "Hi.", "context": turns}))
        assert answer.status_code == 422
        assert len(answer.content) < 500


def test_other_origins_are_not_let_in_unless_named(app_with):
    origin = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with app_with(no_auth=True) as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
        assert client.options("/v1/audio/speech", headers=origin).status_code == 405
    keys = tuple(map(key_digest, KEYS))
    with app_with(keys=keys, cors_origins=("https://page.example",)) as client:
        assert client.options("/v1/audio/speech", headers=origin).status_code == 200
        answer = client.get("/v1/models", headers=origin)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, origin["origin"])


# --- logs ------------------------------------------------------------------------------------------------------------


def test_nothing_private_is_logged(keyed, caplog):
    caplog.set_level(logging.DEBUG)
    text = "Secret words that nobody should read."
    headers = bearer(KEYS[0]) | {"x-request-id": "abc-1"}
    assert keyed.post("/v1/audio/speech", json=SPEECH | {"input": text}, headers=headers).status_code == 200
    keyed.post("/v1/audio/speech", json=SPEECH | {"input": text, "voice": "secretvoice"}, headers=headers)
    keyed.get("/secretpath?secretquery=1", headers=bearer("secretkey"))
    everything = " ".join(str(vars(record)) for record in caplog.records if not record.name.startswith("httpx"))
    assert "secret" not in everything.lower()
    assert KEYS[0] not in everything
    assert "testclient" not in everything  # the client's address
    lines = [vars(record) for record in caplog.records if record.getMessage() == "speech"]
    assert (lines[0]["characters"], lines[0]["outcome"]) == (len(text), "complete")
