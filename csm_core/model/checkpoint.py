"""Checkpoints: find one (bundled, a folder, the Hub), read it straight into the target dtype, write the native layout.

Knows which file holds which part. Tensor names are in layouts.py, downloads in hub.py; it knows no voices, no engine
and not what the codec's settings mean.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from csm_core.config import CSM_1B, MIMI, ModelConfig
from csm_core.empty_weights import empty_weights
from csm_core.errors import (
    CheckpointError,
    CorruptFileError,
    GatedRepoError,
    MissingFileError,
    ShapeMismatchError,
    TokenizerMismatchError,
)
from csm_core.model import hub, layouts
from csm_core.model.csm import CSM
from csm_core.model.layouts import Layout
from csm_core.model.weights import Shape, read_json, read_tensor, tensor_shapes, write_tensors

logger = logging.getLogger(__name__)

FORMAT = "csm-native-1"
BUNDLED = Path(__file__).parent.parent / "bundled"
PROBE = "Hello, world!"  # what a tokenizer must encode as it did when the weights were trained
LLAMA_3_PROBE_IDS = [9906, 11, 1917, 0]

_Files = dict[str, Path]  # published tensor name -> the file that holds it


@dataclass(frozen=True)
class Description:
    """What the weights alone do not say.

    ``codec`` is a ``CodecConfig.to_dict``; ``defaults`` are a ``Profile``'s, of which published layouts know
    ``temperature`` and ``top_k``.
    """

    name: str
    codec: Mapping[str, Any]
    defaults: Mapping[str, Any]
    tokenizer_file: Path


@dataclass(frozen=True)
class Checkpoint(Description):
    """A complete checkpoint on this machine, nothing of it in memory yet.

    ``codec_files`` is empty when the codec is still to be fetched. ``probe_ids`` are PROBE's ids under the tokenizer
    that the weights were trained with, None when unknown.
    """

    directory: Path
    layout: Layout
    config: ModelConfig
    lm_files: Mapping[str, Path]
    codec_files: Mapping[str, Path]
    probe_ids: list[int] | None


def find_checkpoint(model: str = "auto", device: str | torch.device = "cpu") -> Checkpoint:
    """Make the files of ``model`` local and say what they are.

    ``model`` is ``bundled`` (the voice inside this package), ``csm-1b`` (Sesame's repository where it can be read, else
    its ungated mirror), ``auto`` (csm-1b on a CUDA ``device``, else bundled), a folder in any of the three layouts, or
    ``owner/name[@revision]`` on the Hub. Raises CheckpointError or one of its children, each saying what to do.
    """
    if model == "auto":
        model = "csm-1b" if str(device).startswith("cuda") else "bundled"
        if model == "bundled":
            logger.info("model bundled, because the device is %s", device)
    if model == "bundled":
        return _open_folder(BUNDLED, "bundled")
    if model == "csm-1b":
        return _csm_1b()
    folder, repo = Path(model).expanduser(), hub.Repo.parse(model)
    if folder.is_dir():
        return _open_folder(folder, folder.resolve().name)
    if repo is None:
        raise MissingFileError(f'{model} is neither a folder nor "owner/name" on the Hub, nor auto, bundled or csm-1b.')
    return _open_folder(hub.fetch_checkpoint(repo), repo.id)


def _csm_1b() -> Checkpoint:
    repo = hub.CSM_1B_REPO
    try:
        checkpoint = find_checkpoint(repo)
    except (GatedRepoError, MissingFileError) as error:  # the second: not cached, and the Hub is out of reach
        logger.info("model %s, because of: %s", hub.MIRRORS[repo], error)
        return find_checkpoint(hub.MIRRORS[repo])
    logger.info("model %s, which can be read", repo)
    return checkpoint


def _open_folder(folder: Path, name: str) -> Checkpoint:
    """The best complete weights in ``folder`` with what belongs to them; ``name`` where the files give none."""
    weights = _weight_sets(folder)
    layout: Layout
    for layout in ("native", "transformers", "original"):
        if layout in weights:
            break
    else:
        raise MissingFileError(f"{folder} holds no CSM weights as *.safetensors (ckpt.pt is a pickle: never read).")
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise MissingFileError(f"{tokenizer_file} is missing; CSM-1B's is also in {hub.MIRRORS[hub.CSM_1B_REPO]}.")
    files = weights[layout]
    codec_files = {key: file for key, file in files.items() if key.startswith(layouts.CODEC_PREFIXES)}
    try:
        facts = _native_facts(folder) if layout == "native" else {"name": name, **_published_facts(folder)}
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a CSM: {error!r}.") from error
    return Checkpoint(
        **facts,
        tokenizer_file=tokenizer_file,
        directory=folder,
        layout=layout,
        lm_files={key: file for key, file in files.items() if key not in codec_files},
        codec_files=codec_files or weights.get("mimi", {}),
    )


def _native_facts(folder: Path) -> dict[str, Any]:
    raw = read_json(folder / "config.json")
    if raw.get("format") != FORMAT:
        raise CheckpointError(f'{folder / "config.json"} has the format {raw.get("format")}, not "{FORMAT}".')
    facts = {key: raw[key] for key in ("name", "codec", "defaults")}
    return {**facts, "config": ModelConfig.from_dict(raw["model"]), "probe_ids": raw.get("probe_ids")}


def _published_facts(folder: Path) -> dict[str, Any]:
    """From config.json, or as CSM-1B where there is none: a wrong guess ends in ShapeMismatchError."""
    config_file, generation_file = folder / "config.json", folder / "generation_config.json"
    config, codec = CSM_1B, MIMI.to_dict()
    if config_file.is_file():
        raw = read_json(config_file)
        config, codec = layouts.model_config(raw), layouts.codec_config(raw)
    settings = read_json(generation_file) if generation_file.is_file() else {}
    return {
        "config": config,
        "codec": codec,
        "defaults": {key: settings[key] for key in ("temperature", "top_k") if settings.get(key) is not None},
        "probe_ids": LLAMA_3_PROBE_IDS if config.text_vocab_size == CSM_1B.text_vocab_size else None,
    }


def _weight_sets(folder: Path) -> dict[str, _Files]:
    """Kind (a layout, or ``mimi``) -> its tensors, of the complete sets in ``folder``.

    Raises what is wrong with the first broken set if no whole one is a CSM.
    """
    sets: dict[str, _Files] = {}
    sharded: set[Path] = set()
    problems: list[CheckpointError] = []
    for source in (*sorted(folder.glob("*.safetensors.index.json")), *sorted(folder.glob("*.safetensors"))):
        if source in sharded:
            continue
        try:
            parts = _shards(source) if source.suffix == ".json" else [source]
            sharded.update(parts)
            absent = [part.name for part in parts if not part.is_file()]
            if absent:
                raise MissingFileError(f"{source} names {', '.join(absent)}, which is not there: download it again.")
            files = {key: part for part in parts for key in tensor_shapes(part)}
        except CheckpointError as error:
            problems.append(error)
            continue
        kind = layouts.layout_of(files)
        if kind is not None:
            sets.setdefault(kind, files)
    if problems and not sets.keys() - {"mimi"}:
        raise problems[0]
    return sets


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CorruptFileError(f"{index} has no weight_map.")
    return sorted({index.parent / str(name) for name in weight_map.values()})


def load_model(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> CSM:
    """The language model on ``device`` in ``dtype``, in eval mode.

    Each tensor goes from its file into memory that has its final dtype: the peak is the model and the largest tensor.
    Weights that are not those of the configuration raise ShapeMismatchError or CheckpointError before any is read.
    """
    with empty_weights():
        model = CSM(checkpoint.config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    names = layouts.lm_names(checkpoint.layout, checkpoint.config)
    _check_tensors(checkpoint, names, shapes)
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    filled: set[str] = set()
    for published, file in checkpoint.lm_files.items():
        native = names.get(published)
        if native is None:
            continue
        tensor = layouts.to_native(checkpoint.layout, native, read_tensor(file, published), checkpoint.config)
        if native not in filled:
            weights[native].copy_(tensor)
            filled.add(native)
        elif not torch.equal(weights[native], tensor.to(weights[native])):
            raise CheckpointError(f"{published} differs from its twin, but CSM has one audio embedding for both.")
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()  # moves what is not a weight


def _check_tensors(checkpoint: Checkpoint, names: Mapping[str, str], expected: Mapping[str, Shape]) -> None:
    """Every weight there, none that has no place, each of the right shape; by the files' headers alone."""
    known = {published: native for published, native in names.items() if published in checkpoint.lm_files}
    missing = sorted(set(expected) - set(known.values()))
    if missing:
        raise CheckpointError(f"{checkpoint.directory} lacks {len(missing)} tensors, {missing[0]} for one.")
    strange = [name for name in checkpoint.lm_files if name not in names and not name.endswith("rotary_emb.inv_freq")]
    if strange:
        raise CheckpointError(
            f"{checkpoint.directory} has {len(strange)} tensors that CSM has not, {strange[0]} for one."
        )
    for file in sorted(set(checkpoint.lm_files.values())):
        for published, shape in tensor_shapes(file).items():
            if published in known and shape != expected[known[published]]:
                raise ShapeMismatchError(
                    f"{published} in {file} has the shape {shape}; config.json makes it {expected[known[published]]}."
                )


def load_codec_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The codec's weights, fp32 on the CPU, named as in moshi's MimiModel.

    Mimi is fetched from Kyutai here, on first need, when the checkpoint has no codec of its own (original layout).
    """
    files = checkpoint.codec_files
    if not files:
        mimi = hub.fetch_mimi()
        files = dict.fromkeys(tensor_shapes(mimi), mimi)
    state = {
        layouts.without_codec_prefix(name): read_tensor(file, name).to(torch.float32, copy=True)
        for name, file in files.items()
    }
    return layouts.codec_to_native(state, checkpoint.codec)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own tokenizer. Raises TokenizerMismatchError if it is not the one of the weights."""
    tokenizer = _read_tokenizer(checkpoint.tokenizer_file)
    _check_tokenizer(tokenizer, checkpoint.config, checkpoint.tokenizer_file)
    ids = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if checkpoint.probe_ids is not None and ids != checkpoint.probe_ids:
        raise TokenizerMismatchError(
            f'{checkpoint.tokenizer_file} does not belong to these weights: "{PROBE}" becomes {ids}, and was '
            f"{checkpoint.probe_ids} in training."
        )
    return tokenizer


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(file.read_bytes())
    except ValueError as error:
        raise CorruptFileError(f"{file} is not a tokenizer ({error}).") from error


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, file: Path) -> None:
    """Whatever the sentence: ids inside the embedding, and the two special tokens where the weights know them."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.text_vocab_size:
        raise TokenizerMismatchError(
            f"{file} does not belong to these weights: it has ids up to {largest}, they end at "
            f"{config.text_vocab_size - 1}."
        )
    for role, token in (("BOS", config.bos_id), ("EOS", config.eos_id)):
        if tokenizer.id_to_token(token) is None:
            raise TokenizerMismatchError(
                f"{file} does not belong to these weights: it has no id {token}, their {role}."
            )
    probed = tokenizer.encode(PROBE)
    added = {i for i, special in zip(probed.ids, probed.special_tokens_mask, strict=True) if special}
    if not added <= {config.bos_id, config.eos_id}:
        raise TokenizerMismatchError(
            f"{file} does not belong to these weights: it frames a text with the ids {sorted(added)}; theirs are "
            f"{config.bos_id} (BOS) and {config.eos_id} (EOS)."
        )


def save_native(
    folder: Path,
    model: CSM,
    codec_state: Mapping[str, Tensor],
    description: Description,
    dtype: torch.dtype = torch.bfloat16,
    codec_dtype: torch.dtype = torch.float32,
) -> Path:
    """Write ``folder`` in the native layout: model.safetensors, tokenizer.json and, last, config.json.

    Each file appears whole or not at all, replacing one of its name; a folder without config.json is unfinished.
    Raises TokenizerMismatchError before anything is written, OSError when the disk is full.
    """
    tokenizer = _read_tokenizer(description.tokenizer_file)
    _check_tokenizer(tokenizer, model.config, description.tokenizer_file)
    config = {
        "format": FORMAT,
        "name": description.name,
        "model": model.config.to_dict(),
        "codec": dict(description.codec),
        "defaults": dict(description.defaults),
        "probe_ids": tokenizer.encode(PROBE, add_special_tokens=False).ids,
    }
    codec = {f"codec.{name}": tensor for name, tensor in codec_state.items()}
    tensors = {**dict(model.named_parameters()), **codec}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        staged = Path(partial)
        write_tensors(
            staged / "model.safetensors", tensors, {key: codec_dtype if key in codec else dtype for key in tensors}
        )
        shutil.copyfile(description.tokenizer_file, staged / "tokenizer.json")
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / "config.json").unlink(missing_ok=True)
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            (staged / name).replace(folder / name)
    return folder


def convert(src: str, dst: Path) -> Path:
    """Re-save any checkpoint that :func:`find_checkpoint` finds as one bf16 file in the native layout, codec fp32."""
    checkpoint = find_checkpoint(src)
    if dst.resolve() == checkpoint.directory.resolve():
        raise CheckpointError(f"{dst} is the checkpoint itself: choose another folder to convert it into.")
    load_tokenizer(checkpoint)  # a wrong one is found in a second, not after the weights
    model = load_model(checkpoint, "cpu", torch.bfloat16)
    return save_native(dst, model, load_codec_state(checkpoint), checkpoint)
