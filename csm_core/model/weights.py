"""The files of a checkpoint: JSON; which tensors a safetensors file holds, one at a time out, all into a new one.

Knows nothing of layouts or models. Pickled weights (ckpt.pt and the like) are never read: they can run code.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csm_core.errors import CheckpointError, CorruptFileError, MissingFileError

Shape = tuple[int, ...]

_FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def read_json(file: Path) -> dict[str, Any]:
    """Raises MissingFileError or CorruptFileError."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise MissingFileError(f"{file} does not exist.") from error
    except (ValueError, OSError) as error:
        raise CorruptFileError(f"{file} is not readable as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{file} holds no JSON object.")
    return values


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")  # type: ignore[no-untyped-call]


def tensor_shapes(file: Path) -> dict[str, Shape]:
    """Name and shape of every tensor, from the header alone.

    Raises MissingFileError, and CorruptFileError for a file that is truncated or no safetensors.
    """
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist.")
    try:
        with _open(file) as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(
            f"{file} is truncated or not a safetensors file ({error}; {file.stat().st_size:,} bytes). "
            "Delete it and download it again; in a git checkout, run git lfs pull."
        ) from error


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor on the CPU in its stored dtype, backed by the mapped file.

    The file is opened for each tensor anew: pages that were read stay resident as long as a mapping lives, so one
    mapping for all costs the whole file again (1.6 GB of weights: peak 3.15 GB with one, 1.71 GB with one each).
    """
    with _open(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Write a safetensors file, each tensor in its dtype of ``dtypes``, converting one at a time.

    safetensors' own save_file holds a second copy of everything as bytes, 3.1 GB for CSM-1B. The format (an 8-byte
    length, a JSON header, then the raw tensors) is specified at https://github.com/huggingface/safetensors.
    Tensors of wide dtypes come first, so that every tensor is aligned. Raises OSError, for a full disk say.
    """
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header, offset = {}, 0
    for name in names:
        if dtypes[name] not in _FLOATS:
            raise CheckpointError(f"{name} cannot be stored as {dtypes[name]}.")
        end = offset + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _FLOATS[dtypes[name]], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little"))
        out.write(encoded)
        for name in names:
            stored = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
            out.write(stored.reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())  # before the caller renames it: a name must never stand for half a file
