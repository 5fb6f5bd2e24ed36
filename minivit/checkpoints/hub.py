"""Find a checkpoint's files in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, first_few
from ..system.files import read_json
from ..system.home import ensure_home
from .network import explain_failure, status_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"  # names the shards of a large checkpoint
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")  # in order of preference
SUFFIXES = (".safetensors", ".npz", ".bin", ".pth", ".pt", ".tar")  # timm writes .pth.tar
DEMO = Path(__file__).with_name("demo_model")  # the checkpoint that comes with minivit
TIMEOUT_S = 6  # how long to wait for the Hub's first answer


@dataclass(frozen=True)
class Files:
    """The local paths of a checkpoint's files, and the Hub commit that they come from."""

    config: Path | None
    preprocessor: Path | None  # None for timm, which keeps preprocessing in config.json
    weights: tuple[Path, ...]
    commit: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what must be remembered to write it back."""

    source: str = ""  # Hub id, folder or file
    commit: str | None = None  # of the Hub repository
    family: str = ""  # the title of the checkpoint's layout
    # Tensors that classification does not use. They are written back unchanged.
    unused: dict[str, Tensor] = field(default_factory=dict)
    # Hashes of the frozen weights, by the names of the trainable ones (see hash_frozen).
    hashes: dict[frozenset[str], str] = field(default_factory=dict)


def fetch(source: str, revision: str | None, *, weights: bool = True) -> Files:
    """Return the paths of a checkpoint's files, after downloading them if they are on the Hub.

    `source` is a folder, a file of weights, a Hub id, or "demo". With weights=False only the config
    files are fetched. Raises UserError if a file is missing or cannot be downloaded.
    """
    path = DEMO if source == "demo" else Path(os.path.expanduser(source))
    if path.is_file():
        if path.name in WEIGHTS:
            path = path.parent
        elif path.suffix in SUFFIXES:
            return Files(None, None, (path,))
    if path.exists() and not path.is_dir():
        endings = ", ".join(SUFFIXES)
        raise UserError(f"{source}: expected a Hub id, a folder, or a file ending in {endings}")

    place: _Folder | _Hub = _Folder(path) if path.is_dir() else _Hub(source, revision)

    def need(*names: str) -> Path:
        for name in names:
            file = place.get(name)
            if file is not None:
                return file
        raise UserError(
            f"{source}: no {' or '.join(names)} {place.where}; "
            "expected a ViT in the layout of transformers or timm"
        )

    config = need("config.json")
    preprocessor = None
    if "model_type" in read_json(config):
        preprocessor = need("preprocessor_config.json")
    paths: list[Path] = []
    if weights:
        paths = [need(*WEIGHTS)]
        if paths[0].name == INDEX:
            paths = [need(name) for name in _shards(paths[0])]
    return Files(config, preprocessor, tuple(paths), place.revision)


def _shards(index: Path) -> list[str]:
    """Return the names of the weight files that an index lists; they must lie beside it."""
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    outside = [
        name for name in names if Path(name).name != name or not name.endswith(".safetensors")
    ]
    if outside or not names:
        raise UserError(
            f"{index}: expected a weight_map to safetensors files beside it, "
            f"found {first_few(outside) or 'none'}"
        )
    return names


@dataclass(frozen=True)
class _Folder:
    """A folder that holds a checkpoint."""

    path: Path
    where = "in this folder"
    revision = None

    def get(self, name: str) -> Path | None:
        """Return the path of a file, or None if the folder has no such file."""
        path = self.path / name
        return path if path.is_file() else None


class _Hub:
    """A repository on the Hub. All files come from the commit that the first one came from."""

    def __init__(self, source: str, revision: str | None) -> None:
        ensure_home()  # huggingface_hub looks for it when it is imported.
        from huggingface_hub import constants

        self.source = source
        self.asked = revision
        self.revision = revision  # becomes the commit with the first file
        self.endpoint = constants.ENDPOINT
        self.where = f"on {self.endpoint}"
        self.outage = self._probe()  # if the Hub is down, only the cache is searched

    def _probe(self) -> str:
        """Ask the Hub for a file once, and return why it is out of reach, or "" if it answers.

        hf_hub_download would try an unreachable Hub six times and wait longer each time. All other
        errors are left to it.
        """
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

        try:
            url = hf_hub_url(self.source, "config.json", revision=self.revision)
            get_hf_file_metadata(url, timeout=TIMEOUT_S)
        except errors.HfHubHTTPError as error:
            status = status_of(error)
            if status == 429 or status >= 500:
                return explain_failure(error, self.endpoint)
        except errors.HFValidationError as error:
            raise UserError(
                f"{self.source}: neither a folder or file here nor a Hub id (owner/name)"
            ) from error
        except errors.EntryNotFoundError:
            pass
        except Exception as error:  # The HTTP library's exceptions have no common base.
            return explain_failure(error, self.endpoint)
        return ""

    def get(self, name: str) -> Path | None:
        """Return the path of a file in the cache, after downloading it if needed.

        Returns None if the repository has no such file. Raises UserError if it cannot be fetched.
        """
        from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self.source, name, revision=self.revision)
        try:
            path = Path(
                hf_hub_download(
                    self.source,
                    name,
                    revision=self.revision,
                    local_files_only=bool(self.outage),
                )
            )
        except Exception as error:  # It raises what the HTTP library and the disk raise, too.
            if isinstance(error, errors.LocalEntryNotFoundError):
                # Offline, a file that is not in the cache may not exist on the Hub either.
                missing = self.outage and name not in ("config.json", WEIGHTS[-1])
            else:
                missing = isinstance(error, errors.EntryNotFoundError)
            if missing:
                return None
            raise UserError(f"{self.source}: {self._explain(error, name)}") from error
        self.revision = path.parent.name
        if not isinstance(cached, str):
            _verify(path, f"{self.source}: {name} from {self.endpoint}")
        return path

    def _explain(self, error: Exception, name: str) -> str:
        """Say why a file could not be fetched, and what the user can do."""
        from huggingface_hub import errors

        reason = self.outage or explain_failure(error, self.endpoint)
        failure = f"cannot fetch {name} from {self.endpoint} ({reason})"
        if isinstance(error, errors.LocalEntryNotFoundError):
            return (
                f"{failure}, and it is not in the local cache; "
                "try again, or give a local copy with --model FOLDER"
            )
        if isinstance(error, errors.GatedRepoError):
            return (
                f"a gated model; ask for access at {self.endpoint}/{self.source}, "
                "then log in with `hf auth login` or set HF_TOKEN"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"no such folder here, and no such model on {self.endpoint} that you may read; "
                "check the name, or log in with `hf auth login` if it is private"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision {self.asked!r} {self.where}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{failure}; make room, or set HF_HOME to another disk"
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            return f"{failure}; set HF_HOME to a folder that you may write to"
        if status_of(error) in (401, 403):
            return f"{failure}; log in with `hf auth login` or HF_TOKEN as a user who may read it"
        return f"{failure}; try again, or use --model FOLDER"


def _verify(path: Path, name: str) -> None:
    """Compare a new download with its SHA-256, and delete it if they differ.

    The cache names large files by their hash. The Hub gives no SHA-256 for small files.
    """
    blob = path.resolve()
    if len(blob.name) != 64:
        return
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{name} is damaged: its SHA-256 is {digest.hexdigest()}, not {blob.name}; "
            "it was deleted, so try again"
        )
