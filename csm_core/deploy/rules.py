"""What Cerebrium accepts in a cerebrium.toml, as tables: keys and types, hardware, ranges, plans; and Finding.

Data only; lint.py applies it. Sources: the platform's TOML reference and hardware pages, the structs of its
command-line client (CerebriumAI/cerebrium, August 2026), and the limits that its API is known to apply. Where they
disagree the stricter value stands, so a file that passes here passes under either.
"""

from dataclasses import dataclass
from typing import Literal

STRINGS = "a list of strings"


@dataclass(frozen=True)
class Finding:
    """One result of a check: "error" is refused or does other than it says, "warning" is legal but rarely meant.

    ``key`` is the dotted key below ``cerebrium`` ("scaling.max_replicas"), or "" for the file as a whole.
    """

    severity: Literal["error", "warning"]
    key: str
    message: str


def error(key: str, message: str) -> Finding:
    return Finding("error", key, message)


def warning(key: str, message: str) -> Finding:
    return Finding("warning", key, message)


@dataclass(frozen=True)
class Accelerator:
    """One ``compute`` id. ``max_cpu`` and ``max_memory_gb`` are per device; ``plan`` is the smallest that has it."""

    family: str
    max_count: int
    max_cpu: int
    max_memory_gb: int
    plan: str


@dataclass(frozen=True)
class Plan:
    """Ceilings of a plan for one app. ``gpu_replicas`` limits max_replicas of an app with accelerators."""

    gpus: int
    cpu: int
    memory_gb: int
    gpu_replicas: int


# table -> key -> the type that the platform expects. An empty table accepts any key (package names).
KEYS: dict[str, dict[str, str]] = {
    "deployment": {
        "name": "a string",
        "python_version": "a string",
        "docker_base_image_url": "a string",
        "disable_auth": "a boolean",
        "include": STRINGS,
        "exclude": STRINGS,
        "shell_commands": STRINGS,
        "pre_build_commands": STRINGS,
        "use_uv": "a boolean",
        "deployment_initialization_timeout": "a whole number",
    },
    "hardware": {
        "cpu": "a number",
        "memory": "a number",
        "compute": "a string or a list of strings",
        "gpu_count": "a whole number",
        "provider": "a string",
        "region": "a string",
    },
    "scaling": {
        "min_replicas": "a whole number",
        "max_replicas": "a whole number",
        "replica_concurrency": "a whole number",
        "scaling_metric": "a string",
        "scaling_target": "a whole number",
        "scaling_buffer": "a whole number",
        "cooldown": "a whole number",
        "response_grace_period": "a whole number",
        "evaluation_interval_seconds": "a whole number",
        "load_balancing_algorithm": "a string",
        "compute_tier": "a string",
        "roll_out_duration_seconds": "a whole number",
    },
    "dependencies": {"pip": "a table", "apt": "a table", "conda": "a table", "paths": "a table"},
    "dependencies.pip": {},
    "dependencies.apt": {},
    "dependencies.conda": {},
    "dependencies.paths": {"pip": "a string", "apt": "a string", "conda": "a string"},
    "runtime": {"container_runtime": "a string", "custom": "a table", "deepgram": "a table", "rime": "a table"},
    "runtime.custom": {
        "entrypoint": STRINGS,
        "port": "a whole number",
        "healthcheck_endpoint": "a string",
        "readycheck_endpoint": "a string",
        "dockerfile_path": "a string",
    },
    "runtime.deepgram": {
        "port": "a whole number",
        "model_name": "a string",
        "language": "a string",
        "image_version": "a string",
    },
    "runtime.rime": {
        "port": "a whole number",
        "model_name": "a string",
        "language": "a string",
        "image_version": "a string",
    },
    "experimental": {"checkpointing": "a boolean"},
}

# Keys that circulate in public repositories and do nothing.
STALE_KEYS = {
    "gpu": "use `compute`",
    "cuda_version": "choose a base image with docker_base_image_url",
    "max_concurrency": "use `replica_concurrency`",
    "secrets": "set secrets with `cerebrium secrets add` or in the dashboard",
    "dependancies": "the table is [cerebrium.dependencies.apt]",
}

PYTHON_VERSIONS = ("3.10", "3.11", "3.12", "3.13")

# Closed ranges of whole numbers, from the reference; `None` is open.
RANGES: dict[str, tuple[int, int | None]] = {
    "deployment.deployment_initialization_timeout": (60, 830),
    "scaling.min_replicas": (0, 2000),
    "scaling.max_replicas": (1, 2000),
    "scaling.replica_concurrency": (1, None),
    "scaling.scaling_buffer": (0, None),
    "scaling.cooldown": (0, 3600),
    "scaling.response_grace_period": (16, 43_200),
    "scaling.evaluation_interval_seconds": (6, 300),
    "scaling.roll_out_duration_seconds": (0, 600),
    "runtime.custom.port": (1, 65_535),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "deployment.python_version": PYTHON_VERSIONS,
    "scaling.scaling_metric": (
        "concurrency_utilization",
        "requests_per_second",
        "cpu_utilization",
        "memory_utilization",
    ),
    "scaling.load_balancing_algorithm": ("round-robin", "first-available", "min-connections", "random-choice-2"),
    "scaling.compute_tier": ("interruptible", "protected"),
    "runtime.container_runtime": ("v1", "v2"),
}

# These two are measured against running replicas, so the platform refuses them at zero replicas and with a buffer.
RESOURCE_METRICS = ("cpu_utilization", "memory_utilization")

ACCELERATORS: dict[str, Accelerator] = {
    "TURING_T4": Accelerator("NVIDIA", 4, 11, 44, "Hobby"),
    "ADA_L4": Accelerator("NVIDIA", 4, 11, 44, "Hobby"),
    "AMPERE_A10": Accelerator("NVIDIA", 4, 11, 44, "Hobby"),
    "ADA_L40": Accelerator("NVIDIA", 4, 11, 92, "Hobby"),
    "AMPERE_A100_40GB": Accelerator("NVIDIA", 8, 22, 284, "Standard"),
    "AMPERE_A100_80GB": Accelerator("NVIDIA", 8, 22, 284, "Standard"),
    "BLACKWELL_RTX6000": Accelerator("NVIDIA", 8, 24, 218, "Standard"),
    "HOPPER_H100": Accelerator("NVIDIA", 8, 24, 256, "Standard"),
    "HOPPER_H200": Accelerator("NVIDIA", 8, 24, 256, "Standard"),
    "BLACKWELL_B200": Accelerator("NVIDIA", 8, 44, 496, "Standard"),
    "INF2": Accelerator("Inferentia", 12, 8, 32, "Hobby"),
    "TRN1": Accelerator("Trainium", 16, 8, 32, "Enterprise"),
}
MAX_COMPUTE_ENTRIES = 5

# An app without accelerator gets exactly one of these.
CPU_SIZES = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 80)
CPU_MAX_MEMORY_GB = 160

# Smallest first.
PLANS: dict[str, Plan] = {
    "Hobby": Plan(gpus=1, cpu=16, memory_gb=60, gpu_replicas=5),
    "Standard": Plan(gpus=4, cpu=80, memory_gb=160, gpu_replicas=30),
}

PROVIDERS = ("aws", "crusoe", "nebius")
# region -> the provider that must be named with it ("" = none).
REGIONS = {"us-east-1": "", "eu-north-1": "", "us-central1": "nebius", "eu-north1": "nebius", "global": ""}
REGIONS_ON_REQUEST = (
    "us-west-2",
    "eu-west-2",
    "eu-central-1",
    "ap-south-1",
    "ap-northeast-1",
    "sa-east-1",
    "ca-central-1",
    "me-central-1",
)

DEFAULT_INCLUDE = ["./*", "main.py", "cerebrium.toml"]
DEFAULT_EXCLUDE = [".*"]
