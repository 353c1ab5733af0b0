"""Where a model's folder is: on this disk, in the package, or fetched from the Hugging Face hub.

The package comes with a few small models, each a folder in `shipped/`; the folder's name is the model's.
"""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.errors import CheckpointError, ConfigError

SHIPPED = Path(__file__).parent / "shipped"
DEFAULT = "tiny"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Not *.safetensors: some repositories hold the weights a second time in the author's own layout.
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def shipped_names() -> list[str]:
    """The models that come with the package, by name."""
    return sorted(config.parent.name for config in SHIPPED.glob("*/config.json"))


def find_folder(path_or_id: str | Path | None, revision: str | None = None) -> Path:
    """The folder of a model: a local folder, a shipped model by its name, or a hub id.

    A hub id is fetched first. None is the shipped model `tiny`. A local folder with a model in it goes
    before a shipped model of the same name.
    """
    if path_or_id is None:
        _no_revision(revision, f"the shipped model {DEFAULT!r}")
        return SHIPPED / DEFAULT
    name, path = str(path_or_id), Path(path_or_id).expanduser()
    if name in shipped_names() and not (path / "config.json").is_file():
        _no_revision(revision, f"the shipped model {name!r}")
        return SHIPPED / name
    if path.is_dir():
        _no_revision(revision, f"the local folder {path}")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the folder that holds config.json")
    if not _HUB_ID.match(name):
        raise CheckpointError(
            f"there is no folder {name!r}; a model is a folder, a hub id like 'owner/name', or one of those "
            f"that ship with trimtab: {', '.join(shipped_names())}"
        )
    return _fetch(name, revision)


def _no_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ConfigError(f"revision is {revision!r}, which has no meaning for {what}; leave it out")


def _fetch(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    named = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(FILES))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"the hub model {named} is gated: accept its terms on its page and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"the hub model {named} does not exist: there is no such revision") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {repo!r} here and no such model on the hub (or it is private: log in with "
            "`hf auth login`)"
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError):
        raise CheckpointError(
            f"the hub model {named} is not in the local cache and the hub cannot be reached; check the "
            "connection, or name a local folder"
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"fetching the hub model {named} failed: {reason}") from None
    return Path(folder)
