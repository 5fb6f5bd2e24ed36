"""Where a checkpoint's files lie: a folder here, or the Hub's cache after a download."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
DEMO = Path(__file__).with_name("demo_model")  # the checkpoint that comes with minivit
TIMEOUT_S = 6  # for the Hub's first answer; without network a person waits no longer than this


def fetch(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Return the folder that holds a checkpoint's FILES, downloaded if `source` is a Hub id, and the Hub's commit.

    Raises UserError, saying what could not be had, from where, and what to do.
    """
    folder = DEMO if source == "demo" else Path(os.path.expanduser(source))
    if folder.is_dir():
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{source}: no {' or '.join(missing)} in this folder; expected {', '.join(FILES)}")
        return folder, None
    if folder.exists():
        raise UserError(f"{source}: expected a Hub id or a folder, found a file")

    # takes 0.3 s, for those who need it
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    what = f"{source}: cannot fetch %s from {constants.ENDPOINT}"
    try:  # once: hf_hub_download would try an unreachable Hub six times, each with a longer wait
        get_hf_file_metadata(hf_hub_url(source, FILES[0], revision=revision), timeout=TIMEOUT_S)
        cached_only = False
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.EntryNotFoundError):
        cached_only = False  # it answers: hf_hub_download will say what is wrong
    except Exception:  # whatever the HTTP library raises when nobody answers
        cached_only = True
    for name in FILES:
        try:
            path = Path(hf_hub_download(source, name, revision=revision, local_files_only=cached_only))
        except errors.HFValidationError as error:
            raise UserError(f"{source}: neither a folder here nor a Hub id (owner/name)") from error
        except errors.LocalEntryNotFoundError as error:
            raise UserError(
                f"{what % name}, and it is not in the local cache; connect, or give a local copy with --model FOLDER"
            ) from error
        except errors.RepositoryNotFoundError as error:  # gated ones too
            raise UserError(
                f"{source}: no such folder here, and {constants.ENDPOINT} has no such model for you; "
                "check the name, or log in with `hf auth login` if it is gated or private"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(f"{source}: no revision {revision!r} on {constants.ENDPOINT}") from error
        except errors.EntryNotFoundError as error:
            raise UserError(f"{source}: no {name} on {constants.ENDPOINT}; only safetensors checkpoints are read") from error
        except Exception as error:  # whatever the HTTP library raises, or a full disk
            raise UserError(f"{what % name} ({str(error).splitlines()[0]}); try again, or use --model FOLDER") from error
        revision = path.parent.name  # the commit: the next files come from the same one
    return path.parent, revision
