"""From the words of ``csm bench`` to a result: builds the subject and its peers, runs the sections or the search."""

import importlib
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from csm_core.bench import machine, switches
from csm_core.bench.peers import Peer, PeerMissingError, load_peer
from csm_core.bench.recommend import Target, Trial, as_settings, in_words, search
from csm_core.bench.report import report
from csm_core.bench.sections import NAMES, Bench, Plan, Say, finite, run
from csm_core.bench.subject import Source, Subject
from csm_core.config import Settings
from csm_core.device import pick_device
from csm_core.engine.engine import Engine
from csm_core.errors import InvalidInputError
from csm_core.model.quantize import layers_for

SLOTS = {"cuda": 64}  # elsewhere 8


@dataclass(frozen=True)
class Order:
    """One command: what is measured with which settings, and how its line read, for the record."""

    source: Source
    settings: Settings
    command: list[str]
    machine: str | None = None
    threads: int | None = None

    def build(self, settings: Settings) -> Subject:
        subject = self.source.build(settings)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return subject

    def about(self, subject: Subject) -> dict[str, Any]:
        """What every figure has to be read with."""
        return {
            **machine.facts(subject.codec.device, self.command, self.machine),
            "model": subject.name,
            "weights": subject.weights,
            "parameters": subject.parameters,
            "settings": switches.current(subject.settings),
        }


def carry_out(args: Namespace, say: Say) -> tuple[str, bool]:
    """Do what ``csm bench`` was asked for, and write its files. The text to print, and whether a search found any.

    Raises InvalidInputError for words that cannot be used, and what loading the model raises.
    """
    draw = importlib.import_module("csm_core.bench.plot").plot if args.plot else None  # missing? said before measuring
    if args.cores is not None:
        machine.use_cores(args.cores)
    order = read_order(args)
    if args.recommend:
        choices = dict(map(switches.parse_choices, args.choices)) or default_choices(order)
        found = recommend(order, choices, Target(args.target_rtf, args.target_ttfa_ms), args.budget)
    else:
        only = tuple(args.only.split(",")) if args.only else ()
        if unknown := [name for name in only if name not in NAMES]:
            raise InvalidInputError(f"There is no section {unknown[0]!r:.40}; known: {', '.join(NAMES)}.", "only")
        plan = Plan(args.budget, args.target_ttfa_ms, args.voice_seconds, args.seed, only)
        found = measure(order, plan, args.peer, say)
    found = finite(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if draw:
        draw(found, args.plot)
    return report(found), found.get("recommended", found) is not None


def read_order(args: Namespace) -> Order:
    """The part of the words that says what is measured, and how it is set."""
    settings: Settings = args.settings
    device = str(pick_device(args.device or settings.device))
    values = dict(map(switches.parse, args.set))
    slots = {"slots": SLOTS.get(device.partition(":")[0], 8) if args.slots is None else args.slots}
    settings = switches.apply(settings, {**slots, **values}.items())
    dtype = getattr(torch, args.dtype) if args.dtype else None
    source = Source(args.model or settings.model, args.random_weights, device, dtype)
    return Order(source, settings, args.argv, args.machine, args.threads)


def measure(order: Order, plan: Plan, peer_names: list[str], say: Say) -> dict[str, Any]:
    """All sections of ``plan``."""
    say("the model")
    subject = order.build(order.settings)
    peers: dict[str, Peer] = {}
    missing = []
    for name in peer_names:  # before quantisation: they hold the weights as they are
        try:
            peers[name] = load_peer(name, subject)
        except PeerMissingError as error:
            missing.append({"section": f"peer {name}", "reason": str(error)})
    subject.quantize()
    result = run(Bench(subject, plan, peers), say)
    result["skipped"] += missing
    return {"about": order.about(subject), **result}


def recommend(order: Order, choices: Mapping[str, list[Any]], target: Target, budget: float) -> dict[str, Any]:
    """The settings that reach ``target`` for the most callers."""
    started = time.monotonic()
    built: dict[str, Subject] = {}  # the last one: models are dear to build and to hold

    @contextmanager
    def opened(tried: Settings) -> Iterator[tuple[Subject, Engine]]:
        key = str(tried.quantize)
        if key not in built:
            built.clear()
            built[key] = order.build(tried)
            built[key].quantize()
        subject = replace(built[key], settings=tried)
        with subject.engine() as engine:
            yield subject, engine

    found = search(opened, order.settings, choices, target, budget)
    chosen: Trial = found["recommended"] or found["nearest"]
    return {
        "about": order.about(replace(next(iter(built.values())), settings=order.settings)),
        "target": asdict(target),
        "trials": [{**asdict(trial), "meets": trial.meets(target)} for trial in found["trials"]],
        "not_tried": found["not_tried"],
        "recommended": asdict(chosen) if found["recommended"] else None,
        "use": in_words(as_settings(order.settings, chosen)),
        "seconds": time.monotonic() - started,
    }


def default_choices(order: Order) -> dict[str, list[Any]]:
    """What is tried without ``--try``: quantisation, compilation where it pays, schedules of chunks; the dear first."""
    known = switches.names()
    choices: dict[str, list[Any]] = {}
    modes = layers_for(torch.device(order.source.device or "cpu"))
    choices["quantize"] = [order.settings.quantize, *(mode for mode in ("int8", "int4", "fp8") if mode in modes)]
    if "compile" in known and str(order.source.device).startswith("cuda"):
        choices["compile"] = [False, True]
    now = order.settings.engine.chunk_schedule
    choices["chunk_schedule"] = list(dict.fromkeys([now, (1, 2, 4, 8), (1, 1, 2, 4), (2, 2, 4, 8)]))
    return choices
