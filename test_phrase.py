#!/usr/bin/env python3
"""Speak one phrase through a deployed endpoint and save it as a WAV file. Needs nothing but `requests`.

    export CEREBRIUM_TOKEN=...     # dashboard, API Keys
    export CSM_ENDPOINT=https://api.cerebrium.ai/v4/p-xxxx/csm/generate_audio
    python test_phrase.py --text "The train leaves at half past seven." --out train.wav
    python test_phrase.py --text "The same, while it is still being spoken." --stream

Works against Cerebrium's envelope and plain JSON alike, so also against `csm deploy emulate` and a server of your own.
Exit codes: 0 spoken; 1 the endpoint refused, failed or sent silence; 2 this command was called wrongly.
"""

import argparse
import array
import base64
import binascii
import email.utils
import io
import json
import math
import os
import random
import sys
import time
import urllib.parse
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

EXAMPLE = "https://api.cerebrium.ai/v4/p-xxxx/csm/generate_audio"
RETRIED = (429, 502, 503, 504)  # busy, or a replica that is starting, stopping or gone
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever Retry-After says
TIMEOUT = (10.0, 900.0)  # connect, read: a call may wait some minutes for a cold start
SILENCE_DBFS = -60.0  # RMS over the whole clip; speech is around -25

ADVICE = {
    401: "the endpoint wants a token: pass --token or set CEREBRIUM_TOKEN (dashboard, API Keys)",
    403: "the endpoint refused this token: is it of the same project as the app, and not expired?",
    404: f"no such app or function: the address looks like {EXAMPLE}, project with its p-, function last",
    413: "the request is too large for the endpoint",
    422: "the endpoint refused the input",
    429: "the endpoint is busy, also after waiting; try again later or raise max_replicas",
    502: "the endpoint failed or was stopped while it worked",
    503: "the endpoint has no room, also after waiting; try again later or raise max_replicas",
    504: "the endpoint took longer than it may; shorten the text or raise response_grace_period",
}


class CallError(Exception):
    """One sentence for the person at the terminal."""


def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    body = {
        "text": options.text,
        "speaker": options.speaker,
        "seed": options.seed,
        "voice": options.voice,
        "temperature": options.temperature,
        "topk": options.topk,
        "max_audio_length_ms": options.max_audio_length_ms,
    }
    body = {name: value for name, value in body.items() if value is not None}
    try:
        if options.stream:
            stream(options, body)
        else:
            speak(options, body)
    except CallError as error:
        print(f"test_phrase: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("test_phrase: interrupted", file=sys.stderr)
        return 130
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test_phrase.py", description="Speak one phrase through an endpoint.")
    parser.add_argument("--text", default="Hello from the other end of the line.", help="what is said")
    parser.add_argument("--endpoint", default=os.environ.get("CSM_ENDPOINT"), help=f"or CSM_ENDPOINT; {EXAMPLE}")
    parser.add_argument("--token", default=os.environ.get("CEREBRIUM_TOKEN"), help="or CEREBRIUM_TOKEN")
    parser.add_argument("--speaker", type=int, help="number of the speaker, from 0")
    parser.add_argument("--seed", type=int, help="the same seed speaks the same way again")
    parser.add_argument("--voice", help="a voice that the endpoint knows")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--topk", type=int)
    parser.add_argument("--max-audio-length-ms", type=int)
    parser.add_argument("--out", "-o", type=Path, default=Path("speech.wav"), help="the file to write (speech.wav)")
    parser.add_argument("--stream", action="store_true", help="use stream_audio and write the sound as it comes")
    parser.add_argument("--retries", type=int, default=4, help="further attempts while the endpoint is busy (4)")
    options = parser.parse_args(argv)
    if not options.endpoint:
        parser.error(f"give --endpoint or set CSM_ENDPOINT, for example {EXAMPLE}")
    if "p-xxxx" in options.endpoint:
        parser.error("put your project's id in place of p-xxxx; `cerebrium projects list` shows it")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"the folder of {options.out} does not exist")
    options.endpoint = complete_url(options.endpoint, "stream_audio" if options.stream else "generate_audio")
    return options


def complete_url(endpoint: str, function: str) -> str:
    """The function's address: appended to a bare host or app, exchanged for its sibling, else left alone."""
    url = urllib.parse.urlsplit(endpoint)
    parts = [part for part in url.path.split("/") if part]
    if parts and parts[-1] in ("generate_audio", "stream_audio"):
        parts[-1] = function
    elif not parts or (parts[0] == "v4" and len(parts) == 3):
        parts.append(function)
    return urllib.parse.urlunsplit(url._replace(path="/" + "/".join(parts)))


# --- one call --------------------------------------------------------------------------------------------------------


def speak(options: argparse.Namespace, body: dict[str, Any]) -> None:
    """Call, check and save. Prints the file, its duration, the server's run time and the real-time factor."""
    started = time.perf_counter()
    with post(options, body) as answer:
        result, envelope = unwrap(answer)
    round_trip = time.perf_counter() - started
    try:
        data = base64.b64decode(result["audio_data"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        raise CallError("the answer holds no audio (no readable `audio_data`); is this the right function?") from None
    seconds = check_wav(data) or number(result.get("duration_seconds"))
    save(options.out, data)
    print(f"{options.out}: {describe(seconds, result)}")
    server = number(result.get("processing_time_seconds")) or number(envelope.get("run_time_ms")) / 1000
    if server and seconds:
        print(f"server {server:.2f} s, RTF {server / seconds:.2f}; round trip {round_trip:.2f} s")
    else:
        print(f"round trip {round_trip:.2f} s")


def stream(options: argparse.Namespace, body: dict[str, Any]) -> None:
    """Call and write each piece of sound as it arrives. Prints the time to the first one as well."""
    started = time.perf_counter()
    with post(options, body) as answer:
        if "text/event-stream" not in answer.headers.get("content-type", ""):
            raise CallError("the endpoint answered at once instead of streaming; call it without --stream")
        pieces = PieceWriter(options.out, started)
        try:
            for event in read_events(answer):
                if failed := error_of(event):
                    raise CallError(f"the endpoint gave up while speaking: {failed}")
                pieces.add(event)
                if event.get("done"):
                    break
            else:
                raise CallError(f"the stream ended early; {options.out} holds {pieces.seconds:.2f} s of it")
        except requests.RequestException as error:
            raise CallError(f"the connection broke while speaking ({type(error).__name__})") from None
        finally:
            pieces.close()
    if not pieces.seconds or decibels(pieces.sum_of_squares, pieces.samples) < SILENCE_DBFS:
        raise CallError("the audio is silent; try another --seed")
    took = time.perf_counter() - started
    print(f"{options.out}: {describe(pieces.seconds, event)}")
    print(f"first sound after {pieces.first_sound:.2f} s; complete after {took:.2f} s, RTF {took / pieces.seconds:.2f}")


def describe(seconds: float, result: dict[str, Any]) -> str:
    details = [f"{name} {result[name]}" for name in ("model", "seed") if result.get(name) is not None]
    return ", ".join([f"{seconds:.2f} s of speech", *details])


# --- HTTP ------------------------------------------------------------------------------------------------------------


def post(options: argparse.Namespace, body: dict[str, Any]) -> requests.Response:
    """A good answer, after as many attempts as allowed; CallError says what is wrong with any other."""
    headers = {"Accept": "text/event-stream" if options.stream else "application/json"}
    if options.token and options.token.strip():
        headers["Authorization"] = f"Bearer {options.token.strip()}"
    for attempt in range(options.retries + 1):
        answer = send(options.endpoint, headers, body)
        if answer.status_code == 200:
            return answer
        detail, wait = explain(answer), retry_after(answer)
        code = error_code(answer)
        answer.close()
        # Silence was already retried by the endpoint itself, with other settings; once more costs the same again.
        if answer.status_code not in RETRIED or code == "silent_output" or attempt == options.retries:
            raise CallError(detail)
        # Waits double; the random part keeps many clients from coming back together.
        wait = min(max(wait, 2.0**attempt) + random.uniform(0, 1), LONGEST_WAIT)  # noqa: S311
        print(f"the endpoint answered {answer.status_code}; again in {wait:.1f} s", file=sys.stderr)
        time.sleep(wait)
    raise CallError("no attempt was allowed: --retries is negative")


def send(url: str, headers: dict[str, str], body: dict[str, Any]) -> requests.Response:
    host = urllib.parse.urlsplit(url).netloc
    try:
        # A redirect would turn the POST into a GET; it is reported instead.
        return requests.post(url, json=body, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=False)
    except requests.exceptions.SSLError:
        raise CallError(f"{host} does not speak TLS as expected; is it http:// rather than https://?") from None
    except requests.ConnectTimeout:
        raise CallError(f"{host} does not answer; check the address and the network") from None
    except requests.ReadTimeout:
        raise CallError(f"no answer within {TIMEOUT[1]:.0f} s; the app's log in the dashboard says why") from None
    except requests.ConnectionError as error:
        reason = "refused the connection" if "refused" in str(error) else "cannot be reached"
        raise CallError(f"{host} {reason}; is the endpoint running, and the address right?") from None
    except (requests.RequestException, ValueError) as error:
        raise CallError(f"{url!r} cannot be called: {error}") from None


def explain(answer: requests.Response) -> str:
    """A sentence for an answer that is not 200: what it means here, and what the endpoint said."""
    advice = ADVICE.get(answer.status_code)
    if advice is None:
        advice = "redirects are not followed" if answer.is_redirect else "the endpoint failed; its log says why"
    said = error_of(read_json(answer))
    return f"{answer.status_code}: {advice}" + (f" ({said})" if said else "")


def read_json(answer: requests.Response) -> Any:
    try:
        return answer.json()
    except (ValueError, requests.RequestException):
        return None


def unwrap(answer: requests.Response) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result, and the envelope around it (empty when the endpoint answers plain JSON)."""
    body = read_json(answer)
    if not isinstance(body, dict):
        raise CallError("the endpoint did not answer with a JSON object; is this the right address?")
    if failed := error_of(body):
        raise CallError(f"the endpoint failed: {failed}")
    if isinstance(body.get("result"), dict):
        return body["result"], body
    return body, {}


def error_object(body: Any) -> Any:
    """What an answer says about an error, wherever it says it: in the envelope's result or on top."""
    if isinstance(body, dict) and isinstance(body.get("result"), dict):
        body = body["result"]
    if not isinstance(body, dict):
        return None
    return body.get("error") or (None if "audio_data" in body else body.get("detail") or body.get("message"))


def error_of(body: Any) -> str:
    error = error_object(body)
    if not isinstance(error, dict):
        return str(error) if error else ""
    message, param = str(error.get("message", error)), error.get("param")
    return f"{param}: {message}" if param and str(param) not in message else message


def error_code(answer: requests.Response) -> Any:
    error = error_object(read_json(answer))
    return error.get("code") if isinstance(error, dict) else None


def retry_after(answer: requests.Response) -> float:
    """Seconds to wait: the header (seconds or a date), else ``retry_after`` in the error, else 0."""
    header = answer.headers.get("retry-after", "")
    if header.strip().isdigit():
        return float(header)
    if header:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
        except ValueError:
            return 0.0
    error = error_object(read_json(answer))
    return number(error.get("retry_after")) if isinstance(error, dict) else 0.0


def read_events(answer: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, with ``data:`` once, twice or not at all in front."""
    for raw in answer.iter_lines():
        line = raw.decode("utf-8", "replace").strip()
        while line.startswith("data:"):
            line = line[5:].strip()
        if not line.startswith("{"):
            continue  # blank lines, comments, event names, [DONE]
        try:
            event = json.loads(line)
        except ValueError:
            raise CallError("the stream holds something that is not JSON") from None
        if isinstance(event, dict):
            yield event


# --- sound -----------------------------------------------------------------------------------------------------------


class PieceWriter:
    """Writes 16-bit PCM pieces into a WAV that is complete after each of them, and measures them."""

    def __init__(self, path: Path, started: float) -> None:
        self.path, self.started = path, started
        self.file: wave.Wave_write | None = None
        self.samples, self.sum_of_squares, self.sample_rate, self.first_sound = 0, 0.0, 0, 0.0

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate if self.sample_rate else 0.0

    def add(self, event: dict[str, Any]) -> None:
        if not event.get("audio"):
            return
        try:
            data = base64.b64decode(event["audio"], validate=True)
            samples = array.array("h", data)
        except (TypeError, ValueError):
            raise CallError("the stream holds a piece that is not 16-bit PCM in base64") from None
        if self.file is None:
            self.first_sound = time.perf_counter() - self.started
            self.sample_rate = int(number(event.get("sample_rate"))) or 24_000
            try:
                self.file = wave.open(str(self.path), "wb")  # noqa: SIM115  open for the length of the stream
            except OSError as error:
                raise CallError(f"{self.path} cannot be written: {error.strerror}") from None
            self.file.setnchannels(1)
            self.file.setsampwidth(2)
            self.file.setframerate(self.sample_rate)
        self.file.writeframes(data)
        self.samples += len(samples)
        self.sum_of_squares += sum(sample * sample for sample in samples)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def check_wav(data: bytes) -> float:
    """Duration in seconds; CallError for silence. Another format than 16-bit WAV is not measured: 0.0."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            seconds, width, frames = file.getnframes() / file.getframerate(), file.getsampwidth(), file.readframes(-1)
    except (wave.Error, EOFError, ZeroDivisionError):
        if not data:
            raise CallError("the audio is empty; try another --seed") from None
        return 0.0
    if width == 2:
        samples = array.array("h", frames[: len(frames) // 2 * 2])
        if decibels(sum(sample * sample for sample in samples), len(samples)) < SILENCE_DBFS:
            raise CallError("the audio is silent; try another --seed")
    return seconds


def decibels(sum_of_squares: float, samples: int) -> float:
    """RMS level below full scale; minus infinity for nothing at all."""
    return 10.0 * math.log10(sum_of_squares / samples / 2.0**30) if samples and sum_of_squares else -math.inf


def save(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise CallError(f"{path} cannot be written: {error.strerror}") from None


def number(value: Any) -> float:
    """A finite number of an answer, or 0.0 for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
