"""What is counted and measured, for Prometheus. One registry per application; percentiles come from the histograms.

Labels have few values: no path a caller made up, no key, no text.
"""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from csm_core.server.speaking import Speaking

_TTFA = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1, 1.5, 2.5, 5, 10, 30)
_RTF = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85, 1, 1.5, 2, 5, 10)
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Meters:
    """All series of one application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "csm_requests", "HTTP requests answered", ["route", "method", "status"], registry=registry
        )
        self.latency = Histogram(
            "csm_request_seconds",
            "From a request's head to its last byte",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.refused = Counter("csm_refused", "Requests refused by a limit", ["limit"], registry=registry)
        self.speeches = Gauge("csm_speeches", "Speeches that run or wait now", registry=registry)
        self.outcomes = Counter(
            "csm_speeches_ended", "Speeches by how they ended", ["format", "outcome"], registry=registry
        )
        self.ttfa = Histogram("csm_ttfa_seconds", "From the order to the first sound", buckets=_TTFA, registry=registry)
        self.rtf = Histogram(
            "csm_rtf", "Time to speak per second of sound, of complete speeches", buckets=_RTF, registry=registry
        )
        self.audio = Counter("csm_audio_seconds", "Sound made", registry=registry)
        self.underruns = Counter(
            "csm_underrun_seconds", "Pauses that a listener in real time would have heard", registry=registry
        )
        self.retakes = Counter(
            "csm_silent_takes_retried", "Takes spoken again because they were silent", registry=registry
        )
        self.usual_seconds = 2.0  # what a speech lasts here, slowly following

    def speech(self, speech: "Speaking", format_name: str, outcome: str) -> None:
        """A speech is over."""
        self.outcomes.labels(format_name, outcome).inc()
        self.audio.inc(speech.seconds)
        self.underruns.inc(speech.underrun)
        self.retakes.inc(speech.retakes)
        if speech.first_sound is not None:
            self.ttfa.observe(speech.first_sound)
        if outcome == "complete" and speech.seconds:
            self.rtf.observe(speech.spoken / speech.seconds)
            self.usual_seconds += 0.1 * (speech.spoken - self.usual_seconds)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
