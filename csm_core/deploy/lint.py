"""Check a cerebrium.toml before a deploy: everything that the platform refuses, ignores in silence or does otherwise.

The client passes unknown keys on without a word and the backend drops them, so a typo costs a deploy; this says it
first. Knows the file and the folder around it, never the network. The rules are in rules.py.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csm_core.deploy import entry, upload
from csm_core.deploy.rules import (
    ACCELERATORS,
    CHOICES,
    CPU_MAX_MEMORY_GB,
    CPU_SIZES,
    KEYS,
    MAX_COMPUTE_ENTRIES,
    PLANS,
    PROVIDERS,
    RANGES,
    REGIONS,
    REGIONS_ON_REQUEST,
    RESOURCE_METRICS,
    STALE_KEYS,
    STRINGS,
    Finding,
    error,
    warning,
)

# A request is killed after response_grace_period: 90 s of speech at real time, plus the drain.
SHORTEST_GRACE_SECONDS = 120
# A first start downloads 3 to 6 GB of weights inside the initialisation timeout.
SHORTEST_GPU_START_SECONDS = 300

Values = Mapping[str, Any]  # dotted key below `cerebrium` -> value; tables too; only known keys of the right type


def lint(path: str | Path) -> list[Finding]:
    """All findings for one cerebrium.toml, errors first. An empty list means that a deploy does what the file says.

    The folder of the file is the project: main.py, the include patterns and dependency files are looked up there.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [error("", f"{path} does not exist; run this in the project folder or name the file")]
    except OSError as problem:
        return [error("", f"{path} cannot be read: {problem.strerror}")]
    except UnicodeDecodeError:
        return [error("", f"{path} is not UTF-8 text")]
    except tomllib.TOMLDecodeError as problem:
        return [error("", f"{path} is not valid TOML: {problem}")]
    values: dict[str, Any] = {}
    findings = [*_read_document(document, values)]
    if "cerebrium" in document:
        findings += _check_deployment(values)
        findings += _check_ranges_and_choices(values)
        findings += _check_hardware(values)
        findings += _check_placement(values)
        findings += _check_plan(values)
        findings += _check_scaling(values)
        findings += _check_dependencies(values, path.parent)
        findings += _check_runtime(values, path.parent)
        findings += entry.check(values, path.parent)
        findings += upload.check(values, path.parent)
    return sorted(findings, key=lambda finding: finding.severity)


def _read_document(document: dict[str, Any], values: dict[str, Any]) -> Iterator[Finding]:
    """Report unknown tables, unknown keys and wrong types; put what is left into ``values``."""
    if not isinstance(document.get("cerebrium"), dict):
        yield error("", "there is no [cerebrium.*] table; every table's name begins with `cerebrium.`")
    for name in document:
        if name != "cerebrium":
            yield error(name, f"[{name}] is outside `cerebrium` and ignored; write [cerebrium.{name}]")
    project = document.get("cerebrium")
    if isinstance(project, dict):
        yield from _read_table("", project, {name: "a table" for name in KEYS if "." not in name}, values)


def _read_table(
    prefix: str, table: dict[str, Any], keys: Mapping[str, str], values: dict[str, Any]
) -> Iterator[Finding]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if keys and name not in keys:
            yield error(key, f"unknown key `{name}`, ignored by the platform{_hint(name, keys)}")
            continue
        if keys and not _has_type(value, keys[name]):
            yield error(key, _wrong_type(key, value, keys[name]))
            continue
        values[key] = value
        if KEYS.get(key):
            yield from _read_table(f"{key}.", value, KEYS[key], values)


def _hint(name: str, keys: Mapping[str, str]) -> str:
    if name in STALE_KEYS:
        return f"; {STALE_KEYS[name]}"
    close = difflib.get_close_matches(name.lower(), keys, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _has_type(value: object, expected: str) -> bool:
    if isinstance(value, bool):
        return expected == "a boolean"
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return {
        "a string": isinstance(value, str),
        "a whole number": isinstance(value, int),
        "a number": isinstance(value, int | float) and math.isfinite(value),
        "a table": isinstance(value, dict),
        STRINGS: strings,
        "a string or a list of strings": isinstance(value, str) or strings,
    }.get(expected, False)


def _wrong_type(key: str, value: object, expected: str) -> str:
    if key == "deployment.python_version":
        return 'python_version must be quoted: unquoted, 3.10 is the number 3.1 (write python_version = "3.11")'
    if key == "runtime.custom.entrypoint":
        return 'entrypoint must be a list, like ["uvicorn", "main:app"]: a string is split at commas, not at spaces'
    if key == "hardware.memory":
        return "memory must be a number of gigabytes without unit, like 16.0"
    return f"must be {expected}, not {value!r}"


def _check_deployment(values: Values) -> Iterator[Finding]:
    given = values.get("deployment", {})
    name = values.get("deployment.name", "").strip()
    if not name:
        yield error("deployment.name", "name is required; it becomes part of the URL")
    elif not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name):
        yield error(
            "deployment.name", f"{name!r}: use lower-case letters, digits and inner hyphens; it is part of the URL"
        )
    if len(name) > 30:
        yield warning("deployment.name", f"{len(name)} characters; `cerebrium run` refuses more than 30")
    if "python_version" not in given:
        yield warning("deployment.python_version", 'not set, and the documented defaults disagree; set it, like "3.11"')
    if "disable_auth" not in given:
        yield error(
            "deployment.disable_auth", "not set, and the default is a PUBLIC endpoint; set disable_auth = false"
        )
    elif values.get("deployment.disable_auth"):
        yield warning("deployment.disable_auth", "true: anyone who knows the URL can call the app at your expense")
    timeout = values.get("deployment.deployment_initialization_timeout")
    if timeout is not None and timeout < SHORTEST_GPU_START_SECONDS and _accelerators(values):
        yield warning(
            "deployment.deployment_initialization_timeout",
            f"{timeout} s must cover import and the first download of the weights; allow up to 830",
        )


def _check_ranges_and_choices(values: Values) -> Iterator[Finding]:
    for key, (low, high) in RANGES.items():
        value = values.get(key)
        if value is not None and (value < low or (high is not None and value > high)):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            yield error(key, f"{value} is out of range: {limits}")
    for key, choices in CHOICES.items():
        value = values.get(key)
        if value is not None and value not in choices:
            yield error(key, f"{value!r} is not accepted; choose one of {', '.join(choices)}")


def _compute(values: Values) -> list[str]:
    compute = values.get("hardware.compute", "CPU")
    return [compute] if isinstance(compute, str) else list(compute)


def _accelerators(values: Values) -> list[str]:
    return [name for name in _compute(values) if name in ACCELERATORS]


def _check_hardware(values: Values) -> Iterator[Finding]:
    compute = _compute(values)
    unset = [key for key in ("compute", "cpu", "memory") if key not in values.get("hardware", {})]
    if unset:
        yield warning("hardware", f"not set: {', '.join(unset)}; the defaults are a CPU, 2 cores and 4 GB")
    if not compute or "" in compute:
        yield error("hardware.compute", "must not be empty")
        return
    for name in compute:
        if name != "CPU" and name not in ACCELERATORS:
            close = difflib.get_close_matches(name, ["CPU", *ACCELERATORS], n=3, cutoff=0.7)
            yield error(
                "hardware.compute", f"{name!r} does not exist; choose one of {', '.join(close or ACCELERATORS)}"
            )
    if len(compute) > MAX_COMPUTE_ENTRIES:
        yield error("hardware.compute", f"{len(compute)} entries; at most {MAX_COMPUTE_ENTRIES} are accepted")
    families = {ACCELERATORS[name].family if name in ACCELERATORS else "CPU" for name in compute}
    known = [name for name in compute if name == "CPU" or name in ACCELERATORS]
    if len(known) == len(compute) and len(families) > 1:
        yield error("hardware.compute", f"a list must stay in one family; this mixes {', '.join(sorted(families))}")
    elif known == ["CPU"]:
        yield from _check_cpu_app(values)
    elif known:
        yield from _check_accelerator_app(values, [name for name in known if name != "CPU"])
    memory = values.get("hardware.memory", 4.0)
    if memory <= 0 or round(memory, 2) != memory:
        yield error("hardware.memory", f"{memory}: give gigabytes above 0 with at most two decimals")


def _check_cpu_app(values: Values) -> Iterator[Finding]:
    cpu, memory = values.get("hardware.cpu", 2.0), values.get("hardware.memory", 4.0)
    if cpu not in CPU_SIZES:
        yield error("hardware.cpu", f"{cpu} is not a size of a CPU app; choose from {', '.join(map(str, CPU_SIZES))}")
    if memory > CPU_MAX_MEMORY_GB:
        yield error("hardware.memory", f"{memory} GB; a CPU app has at most {CPU_MAX_MEMORY_GB}")
    if values.get("hardware.gpu_count", 0) != 0:
        yield error("hardware.gpu_count", 'must be 0 or absent with compute = "CPU"')


def _check_accelerator_app(values: Values, names: list[str]) -> Iterator[Finding]:
    count = values.get("hardware.gpu_count", 1)
    cpu, memory = values.get("hardware.cpu", 2.0), values.get("hardware.memory", 4.0)
    if count < 1:
        yield error("hardware.gpu_count", f"{count}: an app on {names[0]} needs at least 1")
    if cpu <= 0 or cpu != int(cpu):
        yield error("hardware.cpu", f"{cpu}: with an accelerator only whole cores are accepted")
    for name in names:
        device = ACCELERATORS[name]
        if count > device.max_count:
            yield error("hardware.gpu_count", f"{count} x {name}: at most {device.max_count}")
        for key, value, limit in (
            ("hardware.cpu", cpu, device.max_cpu * max(count, 1)),
            ("hardware.memory", memory, device.max_memory_gb * max(count, 1)),
        ):
            if value > limit:
                yield error(key, f"{value} is over the ceiling of {limit} for {max(count, 1)} x {name}")


def _check_placement(values: Values) -> Iterator[Finding]:
    provider, region = values.get("hardware.provider"), values.get("hardware.region")
    if provider == "coreweave":
        yield error("hardware.provider", "coreweave is refused; leave provider out or choose aws")
    elif provider is not None and provider not in PROVIDERS:
        yield error("hardware.provider", f"{provider!r} is not accepted; choose one of {', '.join(PROVIDERS)}")
    if region in REGIONS_ON_REQUEST:
        yield warning("hardware.region", f"{region} is only open to projects that asked for it")
    elif region is not None and region not in REGIONS:
        yield error("hardware.region", f"{region!r} does not exist; choose one of {', '.join(REGIONS)}")
    elif region is not None and REGIONS[region] and provider != REGIONS[region]:
        yield error("hardware.region", f'{region} needs provider = "{REGIONS[region]}"')


def _check_plan(values: Values) -> Iterator[Finding]:
    """Ceilings of the plans are warnings: the file cannot know which plan the project is on."""
    ceilings = {"hardware.gpu_count": "gpus", "hardware.cpu": "cpu", "hardware.memory": "memory_gb"}
    accelerators = _accelerators(values)
    if accelerators:
        ceilings["scaling.max_replicas"] = "gpu_replicas"
    for key, ceiling in ceilings.items():
        value = values.get(key, 0)
        plan = next((name for name, plan in PLANS.items() if value <= getattr(plan, ceiling)), "Enterprise")
        if plan != "Hobby":
            yield warning(key, f"{value} needs the {plan} plan; Hobby has {getattr(PLANS['Hobby'], ceiling)}")
    for name in accelerators:
        if ACCELERATORS[name].plan != "Hobby":
            yield warning("hardware.compute", f"{name} needs the {ACCELERATORS[name].plan} plan")


def _check_scaling(values: Values) -> Iterator[Finding]:
    low, high = values.get("scaling.min_replicas", 0), values.get("scaling.max_replicas")
    if high is None:
        yield warning("scaling.max_replicas", "not set, and the default is 1: a second caller waits for the first")
    if low > (high if high is not None else 1):
        yield error("scaling.min_replicas", f"{low} is more than max_replicas ({1 if high is None else high})")
    metric = values.get("scaling.scaling_metric", "concurrency_utilization")
    target = values.get("scaling.scaling_target", 100)
    if metric == "requests_per_second" and target < 1:
        yield error("scaling.scaling_target", f"{target}: give a rate of at least 1")
    elif metric != "requests_per_second" and not 1 <= target <= 100:
        yield error("scaling.scaling_target", f"{target} is a percentage for {metric}: from 1 to 100")
    if metric in RESOURCE_METRICS and low == 0:
        yield error("scaling.scaling_metric", f"{metric} is refused with min_replicas = 0: there is nothing to measure")
    if metric in RESOURCE_METRICS and values.get("scaling.scaling_buffer"):
        yield error("scaling.scaling_buffer", f"a buffer is refused with {metric}")
    grace = values.get("scaling.response_grace_period")
    if grace is not None and grace < SHORTEST_GRACE_SECONDS:
        yield warning(
            "scaling.response_grace_period",
            f"requests are killed after {grace} s; long speech and a drain want {SHORTEST_GRACE_SECONDS} or more",
        )


def _check_dependencies(values: Values, root: Path) -> Iterator[Finding]:
    for kind in ("pip", "apt", "conda"):
        inline, file = values.get(f"dependencies.{kind}", {}), values.get(f"dependencies.paths.{kind}")
        key = f"dependencies.paths.{kind}"
        if inline and file:
            yield error(key, f"{kind} packages are given inline and as a file; keep one of the two")
        if file is not None and not (root / file).is_file():
            yield error(key, f"{file!r} does not exist beside the cerebrium.toml")
        for package, version in inline.items():
            key = f"dependencies.{kind}.{package}"
            if not isinstance(version, str):
                yield error(key, f"must be a version in quotes, not {version!r}")
            elif kind == "pip":
                yield from _check_version(key, package, version)


def _check_version(key: str, package: str, version: str) -> Iterator[Finding]:
    if version in ("", "*", "latest"):
        if "://" not in package:
            yield warning(key, f"unpinned: each build takes the {package} of that day")
    elif re.match(r"(==|!=|>=|<=|>|<)", version):
        return
    elif not re.fullmatch(r"[0-9][0-9A-Za-z.+!*-]*", version):
        yield error(key, f"{version!r} is sent as `{package}=={version}`; start it with == >= <= > < or !=")


def _check_runtime(values: Values, root: Path) -> Iterator[Finding]:
    if "runtime.custom" not in values:
        return
    dockerfile = values.get("runtime.custom.dockerfile_path")
    entrypoint = values.get("runtime.custom.entrypoint", [])
    if dockerfile is not None and not (root / dockerfile).is_file():
        yield error("runtime.custom.dockerfile_path", f"{dockerfile!r} does not exist")
    if dockerfile is None and not entrypoint:
        yield error("runtime.custom.entrypoint", "an entrypoint is required without dockerfile_path")
    if dockerfile is not None:
        for key in ("dependencies", "deployment.shell_commands", "deployment.pre_build_commands"):
            if values.get(key):
                yield warning(key, "ignored: the Dockerfile alone decides what is installed")
    port = values.get("runtime.custom.port", 8000)
    given = re.search(r"--port[= ](\d+)", " ".join(entrypoint))
    if given and int(given[1]) != port:
        yield error("runtime.custom.port", f"{port} differs from --port {given[1]} in the entrypoint")
    for name in ("healthcheck_endpoint", "readycheck_endpoint"):
        endpoint = values.get(f"runtime.custom.{name}", "")
        if endpoint and not endpoint.startswith("/"):
            yield error(f"runtime.custom.{name}", f"{endpoint!r} must begin with /")
