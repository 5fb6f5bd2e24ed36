"""Publish a finished run on the Hub: what is uploaded, what stays here, and what the user reads.

The repository is private unless it is asked to be public. The user's photos are never uploaded, and
no name of a local folder but the last part of a path.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ..checkpoints import upload
from ..errors import UserError
from ..settings import TrainSettings
from ..system import files
from . import report
from .model_card import base_checkpoint, hub_base
from .run_folder import REFERENCE, RUN_FILES, SUMMARY, TAIL, base_of

PHOTOS = "predictions.png"  # shows the user's photos
KEPT_HERE = (PHOTOS, REFERENCE)
CHECKPOINT = ("model.safetensors", "config.json", "preprocessor_config.json")
PATHS = ("model", "data", "out")  # the settings that may name local folders


def check(settings: TrainSettings) -> None:
    """Check before anything is loaded what is known of a push by then."""
    if settings.public and settings.push_to_hub is None:
        raise UserError("--public is for --push-to-hub REPO, which was not given")
    if settings.push_to_hub is not None and not settings.dry_run:
        upload.check_login(settings.push_to_hub)


def prepare(settings: TrainSettings) -> None:
    """Create the repository that a run is to be pushed to, and print what will be uploaded.

    In a dry run, nothing is created or asked. Raises UserError if we may not write there.
    """
    repo = settings.push_to_hub
    if repo is None:
        return
    if settings.dry_run:
        wanted = "public" if settings.public else "private"
        state = f"would be created as {wanted} if it does not exist"
    else:
        state = upload.prepare(repo, public=settings.public)
    names = [name for name in RUN_FILES if name not in KEPT_HERE]
    left_out = [f"{PHOTOS}, which shows photos", f"{REFERENCE}, which names photos"]
    base = base_of(settings.model)
    if base != "demo" and Path(os.path.expanduser(base)).exists():
        names.remove(TAIL)
        left_out.append(f"{TAIL}, whose base is a local file")
    print(
        f"{repo}: {state}. When the run is finished, these files are uploaded, without the paths "
        f"of local folders: {', '.join(names)}. Not uploaded: {'; '.join(left_out)}",
        file=sys.stderr,
    )


def publish(out: Path, repo: str) -> None:
    """Upload a finished run, and print the address of the commit.

    Raises UserError if the run no longer has all files of a checkpoint.
    """
    missing = [name for name in CHECKPOINT if not (out / name).exists()]
    if missing:
        raise UserError(
            f"{out}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there any "
            "more, so nothing is uploaded; train again without --resume"
        )
    summary = files.read_json(out / SUMMARY)
    _name_card(out, summary, repo)
    address = upload.push(repo, files_to_upload(out, summary), folder=out)
    print(f"pushed: {address}", file=sys.stderr)


def _name_card(out: Path, summary: Mapping, repo: str) -> None:
    """Let the model card call the model by its repository, unless somebody has edited the card."""
    if "confused" not in summary:  # Earlier versions of minivit did not save all that it says.
        return
    path = out / "README.md"
    written = report.make_card(out, summary, name=summary["settings"]["push_to_hub"])
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") == written:
        report.write_card(out, summary, name=repo)


def files_to_upload(out: Path, summary: Mapping) -> dict[str, Path | bytes]:
    """Return what is uploaded of a run, by name in the repository: paths of files, or their bytes.

    A tail is of no use to others if its base lies in a local folder.
    """
    contents: dict[str, Path | bytes] = {}
    for name in RUN_FILES:
        if name not in KEPT_HERE and (out / name).exists():
            contents[name] = out / name
    if hub_base(summary) is None and base_checkpoint(summary) != "demo":
        contents.pop(TAIL, None)
    text = json.dumps(without_paths(summary), indent=2, ensure_ascii=False) + "\n"
    contents[SUMMARY] = text.encode(errors="backslashreplace")
    return contents


def without_paths(summary: Mapping) -> dict:
    """Return a summary in which local files and folders have only the last part of their path."""
    shown = dict(summary)
    shown["settings"] = dict(summary["settings"])
    hub_id = hub_base(summary)
    for described, names in ((shown, ("base", "tail_base")), (shown["settings"], PATHS)):
        for name in names:
            source = described.get(name)
            if source is not None and source != hub_id:
                described[name] = Path(source).name
    return shown
