"""Files of a checkpoint from the Hugging Face Hub: only the needed ones, at a pinned revision, through its cache.

Knows which files a published repository is made of, not what is in them. Pickles are never asked for.
"""

import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import GatedRepoError as HubGatedRepoError

from csm_core.errors import CheckpointError, CorruptFileError, GatedRepoError, MissingFileError
from csm_core.model.weights import read_json, tensor_shapes

logger = logging.getLogger(__name__)

CSM_1B_REPO = "sesame/csm-1b"
MIRRORS = {CSM_1B_REPO: "unsloth/csm-1b"}  # the same weights and tokenizer, in Transformers' names, without a gate
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"

# What this version was written for. The mirror is missing because no commit of it could be confirmed from two places
# (2026-11: none of what is public names one), nor do its files have Sesame's hashes: it is one file where Sesame's
# Transformers layout is two. So it follows "main"; fetch_checkpoint says which commit that is, and what keeps a change
# there from turning into noise are the checks of names, shapes and tokenizer.
REVISIONS = {
    CSM_1B_REPO: "c92a71e1c419772e25be7dc14d952c2521a740ab",
    "kyutai/moshiko-pytorch-bf16": "2bfc9ae6e89079a5cc7ed2a68436010d91a3d289",
}


class _NotInRepoError(MissingFileError):
    """The Hub was asked and has no such file; other MissingFileErrors may be for want of a connection."""


@dataclass(frozen=True)
class Repo:
    """A model repository at a revision."""

    id: str
    revision: str

    @staticmethod
    def parse(text: str) -> "Repo | None":
        """``owner/name`` or ``owner/name@revision``; None when the text is neither. Known repositories are pinned."""
        match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", text)
        return Repo(match[1], match[2] or REVISIONS.get(match[1], "main")) if match else None


MIMI_REPO = Repo("kyutai/moshiko-pytorch-bf16", REVISIONS["kyutai/moshiko-pytorch-bf16"])


def fetch_checkpoint(repo: Repo) -> Path:
    """Make the files that ``repo``'s layout needs local; returns the folder that holds them all.

    Those are config.json, tokenizer.json, generation_config.json where it exists, and the weights that config.json
    points to: of the 19.6 GB of sesame/csm-1b 7.1 GB. Raises GatedRepoError, MissingFileError, CorruptFileError or
    CheckpointError, each saying what to do.
    """
    config = {}
    try:
        config_file = fetch(repo, "config.json")
    except _NotInRepoError:
        pass
    else:
        config = read_json(config_file)
        commit = config_file.parent.name  # all files are of this one, though "main" may move meanwhile
        if commit != repo.revision:
            logger.info("%s follows %s, now %s; %s@%s stays there", repo.id, repo.revision, commit, repo.id, commit)
        repo = Repo(repo.id, commit)
    # sesame/csm-1b holds two layouts; this key says which file belongs to config.json.
    index = _fetch_if_there(repo, config.get("transformers_weights", "model.safetensors.index.json"))
    index = index or _fetch_if_there(repo, "model.safetensors.index.json")
    if index is None:
        fetch(repo, "model.safetensors")
    elif index.suffix == ".json":
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            fetch(repo, shard)
    _fetch_if_there(repo, "generation_config.json")
    return fetch(repo, "tokenizer.json").parent


def fetch_mimi() -> Path:
    """The codec that belongs to the original layout, as Kyutai publishes it (385 MB)."""
    return fetch(MIMI_REPO, MIMI_FILE)


def fetch(repo: Repo, filename: str) -> Path:
    """One file of ``repo``, from the cache when it is there; a damaged weight file is downloaded once more."""
    if getattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", False) and find_spec("hf_transfer") is None:
        raise CheckpointError(
            "HF_HUB_ENABLE_HF_TRANSFER is set but hf_transfer is not installed: pip install hf-transfer."
        )
    file = _download(repo, filename)
    if file.suffix == ".safetensors":
        try:
            tensor_shapes(file)
        except CorruptFileError:
            file = _download(repo, filename, force=True)
            tensor_shapes(file)
    return file


def _fetch_if_there(repo: Repo, filename: str) -> Path | None:
    try:
        return fetch(repo, filename)
    except MissingFileError:
        return None


def _download(repo: Repo, filename: str, force: bool = False) -> Path:
    where = f"{filename} of {repo.id}"
    try:
        return Path(hf_hub_download(repo.id, filename, revision=repo.revision, force_download=force))
    except HubGatedRepoError as error:
        raise _gated(repo) from error
    except RepositoryNotFoundError as error:
        raise MissingFileError(
            f"There is no model repository {repo.id} on the Hub, or it is private and HF_TOKEN has no access to it."
        ) from error
    except RevisionNotFoundError as error:
        raise MissingFileError(f"{repo.id} has no revision {repo.revision}.") from error
    except LocalEntryNotFoundError as error:
        if _refused(error):
            raise _gated(repo) from error
        raise MissingFileError(
            f"{where} is not in the local cache and the Hub cannot be reached: check the connection, or HF_HUB_OFFLINE."
        ) from error
    except EntryNotFoundError as error:
        raise _NotInRepoError(f"{repo.id} has no file {filename} at revision {repo.revision}.") from error
    except HFValidationError as error:
        raise MissingFileError(f"{repo.id} is not the name of a repository on the Hub.") from error
    except (OSError, ValueError) as error:  # ValueError: a forced download without connection
        if _refused(error):
            raise _gated(repo) from error
        raise CheckpointError(
            f"The download of {where} broke off ({error}). Run it again: it goes on from there."
        ) from error


def _refused(error: BaseException | None) -> bool:
    """Whether the Hub answered 401 or 403: a token without the right to gated repositories gets a bare 403."""
    while error is not None:
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in (401, 403):
            return True
        error = error.__cause__
    return False


def _gated(repo: Repo) -> GatedRepoError:
    message = (
        f"No access to the gated repository {repo.id}: accept its conditions at https://huggingface.co/{repo.id} and "
        "set HF_TOKEN to a token of that account (a fine-grained one needs the right to read gated repositories)."
    )
    if repo.id in MIRRORS:
        message += f' Or use its copy without a gate: "{MIRRORS[repo.id]}".'
    return GatedRepoError(message)
