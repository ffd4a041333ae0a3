"""What follows from a checkpoint and a device before any weight is read: its parts, how its weights are kept, threads.

Shared by whoever builds a model from a checkpoint. Knows no engine that runs and no speech.
"""

from dataclasses import dataclass

import torch

from csm_core.config import CodecConfig, ModelConfig, Profile, Quantization
from csm_core.engine.memory import Precision, weight_bytes
from csm_core.errors import CheckpointError
from csm_core.model.checkpoint import Checkpoint, load_tokenizer
from csm_core.text import TextTokenizer

# Parameters. A step of a small model is many operations too short to share: RTF of the bundled voice on two cores .18
# with two threads and .16 with one; beside two busy processes 9.1 and .38, for the threads wait for each other.
SMALL_MODEL = 50_000_000


@dataclass(frozen=True)
class Parts:
    """What a checkpoint brings beside its weights."""

    codec: CodecConfig
    profile: Profile
    tokenizer: TextTokenizer


def read_parts(checkpoint: Checkpoint) -> Parts:
    """Raises CheckpointError for a config.json of another version or a tokenizer of another model."""
    try:
        codec = CodecConfig.from_dict(checkpoint.codec)
        profile = Profile.from_defaults(checkpoint.name, checkpoint.defaults)
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"The config.json of {checkpoint.name} is not of this version: {error}.") from error
    tokenizer = TextTokenizer(load_tokenizer(checkpoint), checkpoint.config.bos_id, checkpoint.config.eos_id)
    return Parts(codec, profile, tokenizer)


def is_large(model: ModelConfig) -> bool:
    return weight_bytes(model, Precision(1)) >= SMALL_MODEL


def plain_dtype(place: torch.device) -> torch.dtype:
    """Of weights that are not packed."""
    return torch.bfloat16 if place.type == "cuda" else torch.float32


def reading_dtype(quantization: Quantization | None, place: torch.device) -> torch.dtype:
    """In which weights are read: bf16 if they will be packed."""
    return torch.bfloat16 if quantization else plain_dtype(place)


def set_threads(model: ModelConfig, place: torch.device) -> None:
    """One thread of torch's for a small model on the CPU, for the whole process."""
    if place.type == "cpu" and not is_large(model):
        torch.set_num_threads(1)
