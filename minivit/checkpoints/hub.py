"""Find a checkpoint's files in a folder or on the Hugging Face Hub."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.preprocess import Preprocess
from ..errors import UserError, first_few
from ..system.files import read_json
from ..system.home import ensure_home
from .network import explain_failure, status_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"  # names the shards of a large checkpoint
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")  # in order of preference
# The files of weights that can be named by themselves. timm writes .pth.tar, Lightning .ckpt.
SUFFIXES = (".safetensors", ".npz", ".bin", ".pth", ".pt", ".tar", ".ckpt")
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # may hold the settings of an image processor, too
DEMO = Path(__file__).with_name("demo_model")  # the checkpoint that comes with minivit
TIMEOUT_S = 6  # how long to wait for the Hub's first answer
# What else may lie in a folder without a config.json, and without weights that are read.
WITHOUT_CONFIG = {
    "state.safetensors": "it holds a run that is not finished; go on with --resume",
    "adapter_config.json": "it holds an adapter; merge it into its base with PEFT, and save that",
}
WITHOUT_WEIGHTS = {
    "pytorch_model.bin.index.json": "its pickles in parts",
    "tf_model.h5": "its weights for TensorFlow",
    "flax_model.msgpack": "its weights for Flax",
}
# What Trainer writes beside weights, in files with the same endings.
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# Where folders of checkpoints lie in a folder of Trainer's or in the Hub's cache.
BELOW = (
    "*/config.json",
    "snapshots/*/config.json",
    "models--*/snapshots/*/config.json",
    "hub/models--*/snapshots/*/config.json",
)


@dataclass(frozen=True)
class Files:
    """The local paths of a checkpoint's files, and the Hub commit that they come from."""

    config: Path | None
    preprocessor: Path | None  # None for timm, which keeps preprocessing in config.json
    weights: tuple[Path, ...]
    commit: str | None = None
    # Whether the user named a file of weights that need not belong to the config beside it.
    is_lone: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a model came from, and what must be remembered to write it back."""

    source: str = ""  # Hub id, folder or file
    commit: str | None = None  # of the Hub repository
    family: str = ""  # the title of the checkpoint's layout
    # Tensors that classification does not use. They are written back unchanged.
    unused: dict[str, Tensor] = field(default_factory=dict)
    # If the model came from a tail: the base's source, and the names of the weights in the tail.
    base: str = ""
    tail: frozenset[str] = frozenset()


def fetch(source: str, revision: str | None, *, weights: bool = True) -> Files:
    """Return the paths of a checkpoint's files, after downloading them if they are on the Hub.

    `source` is a folder, a file of weights, a Hub id, or "demo". With weights=False only the config
    files are fetched. Raises UserError if a file is missing or cannot be downloaded.
    """
    path = DEMO if source == "demo" else Path(os.path.expanduser(source))
    if path.is_file():
        return _files_beside(path, source)
    if path.exists() and not path.is_dir():
        raise _not_a_checkpoint(source)
    place: _Folder | _Hub = _Folder(path) if path.is_dir() else _Hub(source, revision)
    config = place.get("config.json")
    if config is None:
        raise _missing(source, place, "config.json", place.hint_at_config())
    preprocessor = None
    settings = read_json(config)
    if "model_type" in settings:
        preprocessor = _find_preprocessor(place)
        if preprocessor is None:
            raise _missing(source, place, PREPROCESSOR, _hint_at_preprocessor(settings, place))
    paths: list[Path] = []
    if weights:
        paths = _find_weights(source, place)
    return Files(config, preprocessor, tuple(paths), place.revision)


def find_local(source: str, revision: str | None) -> str | None:
    """Return what fetch() takes in place of a Hub id without asking the Hub: a folder of its cache.

    That of main is the latest that was downloaded. Returns None if the config is not in the cache.
    """
    if source == "demo" or Path(os.path.expanduser(source)).exists():
        return source
    ensure_home()  # huggingface_hub looks for it when it is imported.
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", revision=revision)
    return str(Path(config).parent) if isinstance(config, str) else None


def _files_beside(path: Path, source: str) -> Files:
    """Return a file of weights that the user named, with the config files in its folder if any."""
    if path.name != INDEX and path.suffix not in SUFFIXES:
        raise _not_a_checkpoint(source)
    place = _Folder(path.parent)
    paths: tuple[Path, ...] = (path,)
    if path.name == INDEX:
        paths = tuple(_find_shard(source, place, name) for name in _shards(path))
    config = place.get("config.json")
    is_lone = path.name not in WEIGHTS
    if config is None or path.suffix == ".npz":
        return Files(None, None, paths, is_lone=is_lone)
    settings = read_json(config)
    preprocessor = None
    if "model_type" in settings:
        preprocessor = _find_preprocessor(place)
        if preprocessor is None and is_lone:
            return Files(None, None, paths, is_lone=True)
        if preprocessor is None:
            raise _missing(source, place, PREPROCESSOR, _hint_at_preprocessor(settings, place))
    return Files(config, preprocessor, paths, is_lone=is_lone)


def _not_a_checkpoint(source: str) -> UserError:
    endings = ", ".join(SUFFIXES)
    return UserError(f"{source}: expected a Hub id, a folder, or a file ending in {endings}")


def _missing(source: str, place: _Folder | _Hub, name: str, hint: str) -> UserError:
    return UserError(f"{source}: no {name} {place.where}; {hint}")


def _find_preprocessor(place: _Folder | _Hub) -> Path | None:
    """Return the file with the settings of the image processor, where transformers looks first."""
    path = place.get(PROCESSOR)
    if path is not None and "image_processor" in read_json(path):
        return path
    return place.get(PREPROCESSOR)


def read_preprocess(path: Path, model_type: str) -> Preprocess:
    """Read the settings of the image processor that fetch() found, for a config's model_type."""
    settings = read_json(path)
    if path.name == PROCESSOR:
        settings = settings["image_processor"]
    try:
        return Preprocess.from_config(settings, model_type)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error


def _hint_at_preprocessor(config: dict, place: _Folder | _Hub) -> str:
    """Say what preprocessor_config.json is for, and where to get it."""
    base = config.get("_name_or_path")
    where = "from the checkpoint that this one was fine-tuned from"
    if isinstance(base, str) and base.count("/") == 1 and not base.startswith(("/", ".")):
        where = f"from {base}, which config.json names as the base"
    if isinstance(place, _Folder) and (place.path.parent / PREPROCESSOR).is_file():
        where = "from the folder above, which has one"
    if isinstance(place, _Hub):
        where += ", into a local copy of the repository"
    return f"it says how photos become pixels; copy it {where}"


def _find_weights(source: str, place: _Folder | _Hub) -> list[Path]:
    """Return the files of weights in a place."""
    for name in WEIGHTS:
        path = place.get(name)
        if path is None:
            continue
        if name != INDEX:
            return [path]
        return [_find_shard(source, place, shard) for shard in _shards(path)]
    raise _missing(source, place, " or ".join(WEIGHTS), place.hint_at_weights())


def _find_shard(source: str, place: _Folder | _Hub, name: str) -> Path:
    path = place.get(name)
    if path is None:
        raise _missing(source, place, name, f"{INDEX} lists it; get it from where the others are")
    return path


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
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path}: a link to {path.readlink()}, which is not there; copy it again"
            )
        return path if path.is_file() else None

    def hint_at_config(self) -> str:
        """Say which folder below this one to give, or which file in it."""
        configs = [path for pattern in BELOW for path in self.path.glob(pattern)]
        if configs:
            folder = max(configs, key=_how_late).parent
            if len(configs) == 1:
                return f"the folder {folder} below it has one; give that"
            return (
                f"{len(configs)} folders below it hold one; "
                f"give the latest, {folder}, or another of them"
            )
        for name, explanation in WITHOUT_CONFIG.items():
            if (self.path / name).exists():
                return explanation
        files = self._files_of_weights()
        if files:
            return f"without it, give a file of weights itself: {first_few(files)}"
        return "expected a ViT in the layout of transformers or timm"

    def hint_at_weights(self) -> str:
        """Say which other files of weights are in the folder."""
        for name, description in WITHOUT_WEIGHTS.items():
            if (self.path / name).exists():
                return f"{description} are not read; load and save it with transformers 5"
        files = self._files_of_weights()
        if files:
            return f"to read one of another name, give the file itself: {first_few(files)}"
        return "expected a ViT in the layout of transformers or timm"

    def _files_of_weights(self) -> list[Path]:
        return sorted(
            path
            for path in self.path.iterdir()
            if path.suffix in SUFFIXES and not path.name.startswith(NOT_WEIGHTS)
        )


def _how_late(config: Path) -> tuple[int, bool, float]:
    """Return what grows from earlier to later checkpoints, given their config files.

    Trainer numbers its checkpoints by steps. In the Hub's cache, refs/main names the latest commit.
    """
    folder = config.parent
    number = folder.name.removeprefix("checkpoint-")
    steps = int(number) if number.isdecimal() and number != folder.name else -1
    main = folder.parent.parent / "refs" / "main"
    is_main = False
    if folder.parent.name == "snapshots" and main.is_file():
        is_main = main.read_text(encoding="utf-8", errors="replace").strip() == folder.name
    return steps, is_main, config.stat().st_mtime


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

    def hint_at_config(self) -> str:
        return "expected a ViT in the layout of transformers or timm"

    hint_at_weights = hint_at_config

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
