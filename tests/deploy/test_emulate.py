"""The emulator against a small real main.py over real HTTP: what the platform documents, and that nothing kills it."""

import http.client
import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from csm_core.deploy.emulate import Emulator, import_main, public_functions, running

TOKEN = "s3cret"
MAX_BODY = 100_000

STAND_IN = """
import json
import json as _json
import threading
import time
from dataclasses import dataclass
from textwrap import dedent

IMPORTED_ON = threading.current_thread().name
closed = threading.Event()


@dataclass
class Thing:
    name: "str"


def echo(text, count: int = 1, run_id=None):
    return {"text": text, "count": count, "given_run_id": run_id}


async def async_echo(text):
    return text


def plain(*, value=None):
    return value


def anything(**values):
    return values


def _hidden():
    return "never"


def answer_with(status_code):
    return {"status_code": status_code, "why": "asked for"}


def fail():
    secret = "do not show this"
    raise ValueError(secret)


def leave():
    raise SystemExit(3)


def not_json():
    return {1, 2}


def nan():
    return {"x": float("nan")}


def surrogate():
    return "\\ud800"


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def raw():
    return b"bytes"


def count(upper=3):
    for index in range(upper):
        yield f"Number {index} "


async def async_count():
    for index in range(2):
        yield {"index": index}


def ready_made():
    yield 'data: {"a": 1}\\n\\n'
    yield "two\\nlines"
    yield b"data: [DONE]\\n\\n"


def returned_generator(bad=False):
    if bad:
        return {"status_code": 422, "error": {"message": "bad"}}
    return (i for i in range(2))


def fails_at_once():
    raise RuntimeError("before the first item")
    yield


def fails_later():
    yield "one"
    raise RuntimeError("in the middle")


def bad_item():
    yield float("nan")


def empty():
    return iter(())


def endless():
    try:
        while True:
            yield "x" * 1000
            time.sleep(0.005)
    finally:
        closed.set()


def endless_and_kept():
    kept.append(endless())  # nothing but close() ends it: it is never forgotten
    return kept[-1]


kept = []


def was_closed():
    return closed.wait(5)
"""


@pytest.fixture(autouse=True)
def clean_import_path():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("emulated_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Emulator:
    main = tmp_path_factory.mktemp("app") / "main.py"
    main.write_text(STAND_IN)
    return Emulator(main, token=TOKEN, project="p-1", app="speak", max_body_bytes=MAX_BODY)


@pytest.fixture(scope="module")
def url(emulator):
    with running(emulator) as url:
        yield url


def call(url, function, body=None, token=TOKEN, **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    options.setdefault("timeout", 60)
    if body is not None:
        options["data"] = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(f"{url}/{function}", headers=headers, **options)


def test_envelope_arguments_and_run_id(url):
    answer = call(url, "echo", {"text": "hé", "count": 2})
    body = answer.json()
    assert answer.status_code == 200
    assert url.endswith("/v4/p-1/speak")
    assert set(body) == {"run_id", "result", "run_time_ms"}
    assert body["run_time_ms"] >= 0
    assert body["result"] == {"text": "hé", "count": 2, "given_run_id": body["run_id"]}
    assert answer.headers["x-request-id"] == body["run_id"]


def test_run_id_cannot_be_forged_by_the_body(url):
    body = call(url, "echo", {"text": "a", "run_id": "mine"}).json()
    assert body["result"]["given_run_id"] == body["run_id"] != "mine"


def test_async_functions_and_any_keyword(url):
    assert call(url, "async_echo", {"text": "a"}).json()["result"] == "a"
    assert call(url, "anything", {"x": 1, "y": [2]}).json()["result"] == {"x": 1, "y": [2]}


def test_main_is_imported_on_a_worker_thread(emulator):
    imported_on = emulator.functions["echo"].__globals__["IMPORTED_ON"]
    assert imported_on.startswith("import-main")


def test_only_functions_without_underscore_are_published_also_imported_ones(emulator):
    assert "_hidden" not in emulator.functions
    assert not {"json", "threading", "Thing", "dataclass_", "closed", "IMPORTED_ON"} & set(emulator.functions)
    assert {"echo", "async_echo", "count", "dedent", "dataclass"} <= set(emulator.functions)


@pytest.mark.parametrize(
    "name", ["_hidden", "json", "Thing", "closed", "nothing", "", "echo/", "__init__", "%00", "%ed%a0%80"]
)
def test_what_is_not_published_is_404_with_a_sentence(url, name):
    answer = call(url, name, {})
    assert answer.status_code == 404
    assert answer.json()["result"]["error"]["message"].endswith(".")


def test_another_project_or_app_is_404(url):
    assert call(url.replace("p-1", "p-2"), "echo", {"text": "a"}).status_code == 404
    assert call(url.replace("speak", "other"), "echo", {"text": "a"}).status_code == 404
    assert (
        requests.post(url.split("/v4")[0], headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5).status_code == 404
    )


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer  ", 401),
        (f"Basic {TOKEN}", 401),
        ("Bearer wrong", 403),
        (f"Bearer {TOKEN}x", 403),
        ("Bearer é".encode(), 403),
        (f"bearer {TOKEN}", 200),
    ],
)
def test_bearer_token(url, header, status):
    headers = {} if header is None else {"Authorization": header}
    answer = requests.post(f"{url}/plain", headers=headers, timeout=5)
    assert answer.status_code == status
    assert ("www-authenticate" in answer.headers) == (status == 401)


def test_a_wrong_token_does_not_reveal_which_functions_exist(url):
    known, unknown = call(url, "echo", {}, token="no"), call(url, "nothing", {}, token="no")
    assert known.status_code == unknown.status_code == 403
    assert known.json()["result"] == unknown.json()["result"]


def test_without_token_the_app_is_open(tmp_path):
    main = tmp_path / "main.py"
    main.write_text("def f():\n    return 1\n")
    with running(Emulator(main)) as url:
        assert url.endswith("/v4/p-local/csm")
        assert url.startswith("http://127.0.0.1:")
        assert requests.post(f"{url}/f", timeout=5).json()["result"] == 1


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "FOO"])
def test_only_post_calls_a_function(url, method):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert requests.request(method, f"{url}/echo", headers=headers, timeout=5).status_code == 405


@pytest.mark.parametrize(
    "body",
    [b"{", b"not json", b"[1]", b'"text"', b"1", b"null", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 15_000, b"9" * 5_000],
    ids=["open", "words", "list", "string", "number", "null", "bytes", "deep list", "deep object", "huge number"],
)
def test_a_body_that_is_no_json_object_is_400(url, body):
    answer = call(url, "anything", body)
    assert answer.status_code == 400
    assert answer.json()["result"]["error"]["code"] == "invalid_json"


def test_an_empty_body_is_no_arguments(url):
    assert call(url, "plain").json()["result"] is None


def test_parameters_are_checked_by_name(url):
    missing = call(url, "echo", {})
    assert missing.status_code == 422
    assert missing.json()["result"]["error"]["param"] == "text"
    unknown = call(url, "echo", {"text": "a", "pitch": 2})
    assert unknown.status_code == 422
    assert unknown.json()["result"]["error"]["param"] == "pitch"
    assert "text, count" in unknown.json()["result"]["error"]["message"]


def test_a_body_over_the_limit_is_413_and_the_client_reads_the_answer(url):
    host, path = url.removeprefix("http://").split("/", 1)
    connection = http.client.HTTPConnection(host, timeout=60)  # complains when nobody takes what it sends
    body = b'{"value": "' + b"a" * 4_000_000 + b'"}'
    connection.request("POST", f"/{path}/plain", body, {"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    assert answer.status == 413
    assert f"{MAX_BODY:,}" in json.loads(answer.read())["result"]["error"]["message"]
    connection.close()
    assert call(url, "plain", b'{"value": "' + b"a" * (MAX_BODY - 13) + b'"}').status_code == 200


@pytest.mark.parametrize("status", [200, 201, 404, 422, 429, 501, 599])
def test_status_code_in_the_result_is_the_http_status(url, status):
    answer = call(url, "answer_with", {"status_code": status})
    assert answer.status_code == status
    assert answer.json()["result"] == {"status_code": status, "why": "asked for"}


@pytest.mark.parametrize("status", [0, 100, 204, 304, 600, -1, "422", None, True, 404.0])
def test_an_impossible_status_code_is_500(url, status):
    answer = call(url, "answer_with", {"status_code": status})
    assert answer.status_code == 500
    assert answer.json()["result"]["error"]["code"] == "invalid_status_code"


@pytest.mark.parametrize("function", ["fail", "leave", "fails_at_once"])
def test_an_exception_is_a_sentence_without_traceback(url, function):
    answer = call(url, function, {})
    assert answer.status_code == 500
    assert "Traceback" not in answer.text
    assert "do not show" not in answer.text
    assert answer.json()["result"]["error"]["code"] == "exception"
    assert set(answer.json()) == {"run_id", "result", "run_time_ms"}


@pytest.mark.parametrize("function", ["not_json", "nan", "deep", "raw"])
def test_a_result_that_is_no_json_is_500(url, function):
    answer = call(url, function, {})
    assert answer.status_code == 500
    assert answer.json()["result"]["error"]["code"] == "invalid_result"


def test_nan_and_lone_surrogates_travel_in_valid_json(url):
    assert call(url, "plain", b'{"value": "\\ud800"}').json()["result"] == "\ud800"
    assert call(url, "surrogate", {}).json()["result"] == "\ud800"
    assert call(url, "plain", b'{"value": NaN}').status_code == 500  # reaches the function; its result cannot be sent
    assert call(url, "echo", b'{"text": "a", "\\ud800": 1}').status_code == 422


def events(answer):
    return [block for block in answer.text.split("\n\n") if block]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("count", ["data: Number 0 ", "data: Number 1 ", "data: Number 2 "]),
        ("async_count", ['data: {"index": 0}', 'data: {"index": 1}']),
        ("ready_made", ['data: {"a": 1}', "data: two\ndata: lines", "data: [DONE]"]),
        ("returned_generator", ["data: 0", "data: 1"]),
        ("empty", []),
    ],
)
def test_iterators_become_server_sent_events(url, function, expected):
    answer = call(url, function, {})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events(answer) == expected


def test_a_function_may_refuse_before_it_streams(url):
    answer = call(url, "returned_generator", {"bad": True})
    assert answer.status_code == 422
    assert answer.json()["result"]["error"]["message"] == "bad"


@pytest.mark.parametrize("function", ["fails_later", "bad_item"])
def test_a_failure_inside_a_stream_is_its_last_event(url, function):
    last = events(call(url, function, {}))[-1]
    assert last.startswith("event: error\ndata: ")
    assert "Traceback" not in last
    assert json.loads(last.split("data: ")[1])["status_code"] == 500


def test_the_first_event_arrives_while_the_function_still_runs(url):
    with call(url, "endless", {}, stream=True) as answer:
        assert next(answer.iter_lines()).startswith(b"data: xxx")


@pytest.mark.parametrize("function", ["endless", "endless_and_kept"])
def test_a_client_that_leaves_closes_the_generator(emulator, url, function):
    emulator.functions["endless"].__globals__["closed"].clear()
    with call(url, function, {}, stream=True) as answer:
        next(answer.iter_lines())
    assert call(url, "was_closed", {}).json()["result"] is True


def test_calls_run_side_by_side(tmp_path):
    main = tmp_path / "main.py"
    main.write_text("import threading\nmeeting = threading.Barrier(6)\ndef meet():\n    meeting.wait(30)\n")
    with running(Emulator(main)) as url, ThreadPoolExecutor(6) as callers:
        answers = list(callers.map(lambda _: requests.post(f"{url}/meet", timeout=40), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6


def test_rubbish_on_the_wire_and_half_requests_leave_the_server_alive(url):
    host, port = url.split("/")[2].split(":")
    for rubbish in (b"\x00\x01\x02\r\n\r\n", b"POST /x HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", b"GET"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(rubbish)
    odd_host = requests.post(f"{url}/plain", headers={"Authorization": f"Bearer {TOKEN}", "Host": "["}, timeout=60)
    assert odd_host.status_code == 200
    assert call(url, "plain", {"value": 1}).json()["result"] == 1


def test_a_failing_import_is_raised_and_keeps_the_app_from_starting(tmp_path):
    main = tmp_path / "main.py"
    main.write_text("raise RuntimeError('no weights')\n")
    with pytest.raises(RuntimeError, match="no weights"):
        Emulator(main)
    main.write_text("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\n")
    with pytest.raises(ValueError, match="main thread"):
        Emulator(main)
    with pytest.raises(FileNotFoundError, match="not a Python file"):
        Emulator(Path(tmp_path / "missing.py"))


def test_main_can_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_main.py").write_text("VALUE = 7\n")
    main = tmp_path / "main.py"
    main.write_text("import neighbour_of_main as _n\ndef f():\n    return _n.VALUE\n")
    assert public_functions(import_main(main))["f"]() == 7
