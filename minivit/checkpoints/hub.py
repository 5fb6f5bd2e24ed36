"""Where a checkpoint's files lie: here, or in the Hub's cache after a download; and a finished folder up to the Hub."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..system.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)  # the first that is there is read
DEMO = Path(__file__).with_name("demo_model")  # the checkpoint that comes with minivit
TIMEOUT_S = 6  # for the Hub's first answer; without network a person waits no longer than this
SUFFIXES = (
    ".safetensors",
    ".npz",
    ".bin",
    ".pth",
    ".pt",
    ".tar",
)  # timm names its checkpoints .pth.tar


@dataclass(frozen=True)
class Files:
    """A checkpoint's files here, and the commit of the Hub's repository that they are from."""

    config: Path | None
    preprocessor: Path | None  # timm keeps it in config.json
    weights: tuple[Path, ...]
    commit: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what its file held that classification does not use (written back untouched)."""

    source: str = ""  # Hub id, folder or file
    commit: str | None = None  # of the Hub repository
    family: str = ""  # whose layout it had
    unused: dict[str, Tensor] = field(default_factory=dict)
    hashes: dict[frozenset[str], str] = field(
        default_factory=dict
    )  # of what is frozen, by the names of what is not


def fetch(source: str, revision: str | None, *, weights: bool = True) -> Files:
    """Return where a checkpoint's files are, downloaded if `source` is a Hub id; with or without its `weights`.

    Raises UserError, saying what could not be had, from where, and what to do.
    """
    path = DEMO if source == "demo" else Path(os.path.expanduser(source))
    if path.is_file() and path.name in WEIGHTS:
        path = path.parent
    if path.is_file() and path.suffix in SUFFIXES:
        return Files(None, None, (path,))
    if path.exists() and not path.is_dir():
        raise UserError(
            f"{source}: expected a Hub id, a folder, or a file ending in {', '.join(SUFFIXES)}"
        )
    hub = None if path.is_dir() else _Hub(source, revision)
    get = hub.get if hub else lambda name: path / name if (path / name).is_file() else None

    def need(*names: str) -> Path:
        found = next(filter(None, map(get, names)), None)
        if found is None:
            where, others = (
                f"on {hub.endpoint}" if hub else "in this folder",
                "".join(f", nor {name}" for name in names[1:]),
            )
            raise UserError(
                f"{source}: no {names[0]} {where}{others}; expected a ViT as transformers or timm lays it out"
            )
        return found

    config = need("config.json")
    preprocessor = need("preprocessor_config.json") if "model_type" in read_json(config) else None
    found: tuple[Path, ...] = (need(*WEIGHTS),) if weights else ()
    if found and found[0].name == WEIGHTS[1]:
        found = tuple(need(name) for name in _shards(found[0]))
    return Files(config, preprocessor, found, hub.revision if hub else None)


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index speaks of, which lie beside it."""
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or any(
        Path(name).name != name or not name.endswith(".safetensors") for name in names
    ):
        raise UserError(
            f"{index}: expected a weight_map to safetensors files beside it, found {', '.join(names) or 'none'}"
        )
    return names


class _Hub:
    """One repository of the Hub, at the commit that its first file came from."""

    def __init__(self, source: str, revision: str | None) -> None:
        from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

        self.source, self.revision, self.asked, self.endpoint = (
            source,
            revision,
            revision,
            constants.ENDPOINT,
        )
        self.silent = None  # why the Hub does not answer; then only the cache is asked
        try:  # once: hf_hub_download would try an unreachable Hub six times, each with a longer wait
            get_hf_file_metadata(
                hf_hub_url(source, "config.json", revision=revision), timeout=TIMEOUT_S
            )
        except (
            errors.HfHubHTTPError
        ) as error:  # else it answers: hf_hub_download will say what is wrong
            if _status(error) == 429 or _status(error) >= 500:
                why = "too many requests" if _status(error) == 429 else "an error of its own"
                self.silent = f"it answers {_status(error)}, {why}: try later"
        except errors.HFValidationError as error:
            raise UserError(
                f"{source}: neither a folder or file here nor a Hub id (owner/name)"
            ) from error
        except errors.EntryNotFoundError:
            pass
        except Exception:  # whatever the HTTP library raises when nobody answers
            self.silent = "no answer: connect"

    def get(self, name: str) -> Path | None:
        """Return a file's path in the cache, downloaded if need be; None if the repository has no such file."""
        from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

        cached = isinstance(try_to_load_from_cache(self.source, name, revision=self.revision), str)
        try:
            path = Path(
                hf_hub_download(
                    self.source, name, revision=self.revision, local_files_only=bool(self.silent)
                )
            )
        except errors.LocalEntryNotFoundError as error:
            if self.silent and name not in ("config.json", WEIGHTS[-1]):
                return None  # perhaps there is none
            raise UserError(
                f"{self.source}: cannot fetch {name} from {self.endpoint} ({self.silent or _reason(error)}), and it is not in "
                "the local cache; try again, or give a local copy with --model FOLDER"
            ) from error
        except errors.GatedRepoError as error:
            raise UserError(
                f"{self.source}: a gated model; ask for access at {self.endpoint}/{self.source}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(
                f"{self.source}: no such folder here, and {self.endpoint} has no such model for you; check the name, or log "
                "in with `hf auth login` if it is private"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(
                f"{self.source}: no revision {self.asked!r} on {self.endpoint}"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # whatever the HTTP library raises, or a full disk
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = (
                "make room, or set HF_HOME to another disk"
                if full
                else "try again, or use --model FOLDER"
            )
            raise UserError(
                f"{self.source}: cannot fetch {name} from {self.endpoint} ({_reason(error)}); {advice}"
            ) from error
        self.revision = path.parent.name  # the commit: the next files come from the same one
        if not cached:
            _verify(path, f"{self.source}: {name} from {self.endpoint}")
        return path


def prepare_push(repo: str) -> None:
    """Make sure before hours of training that a repository is there, and ours to write to. Raises UserError if not."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _pushing(repo):
        validate_repo_id(repo)
        HfApi().whoami()  # create_repo asks nothing of who may only read what is there
        HfApi().create_repo(repo, exist_ok=True)


def push(folder: Path, repo: str, names: Iterable[str]) -> str:
    """Upload files of a folder, in one commit, and return its address. Raises UserError; the files stay here."""
    from huggingface_hub import HfApi

    with _pushing(repo):
        return str(
            HfApi()
            .upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(names))
            .commit_url
        )


@contextlib.contextmanager
def _pushing(repo: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as error:  # whatever the HTTP library raises
        denied = _status(error) in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)
        advice = (
            "log in with `hf auth login` or HF_TOKEN, with the right to write there"
            if denied
            else "try again"
        )
        advice += f", or later with `hf upload {repo} DIR`"
        if isinstance(error, errors.HFValidationError):
            advice = "expected --push-to-hub owner/name"
        raise UserError(
            f"{repo}: cannot push to {constants.ENDPOINT} ({_reason(error)}); {advice}"
        ) from error


def _verify(path: Path, what: str) -> None:
    """Hold a fresh download against its SHA-256, by which the cache names large files; remove it if it differs."""
    blob = path.resolve()
    if len(blob.name) != 64:
        return  # the Hub gives none for small files
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{what} is damaged: its SHA-256 is {digest.hexdigest()}, not {blob.name}; removed, try again"
        )


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)  # 0 where nobody answered


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
