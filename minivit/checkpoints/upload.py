"""Upload files to a repository on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import UserError
from .network import explain_failure, status_of

NOTHING_TRAINED = "nothing was trained; mend it, or leave --push-to-hub away"


def check_login(repo: str) -> None:
    """Raise UserError if the name is not that of a repository, or if nobody is logged in."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _push_errors(repo, NOTHING_TRAINED):
        validate_repo_id(repo)
        HfApi().whoami()


def prepare(repo: str, *, public: bool) -> str:
    """Create a repository if it does not exist, and say in words who can read it.

    Called before training, so that hours of work do not end with a refusal. The visibility of a
    repository that exists is never changed. Raises UserError if we may not write there.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    with _push_errors(repo, NOTHING_TRAINED):
        try:
            info = api.repo_info(repo)
        except errors.RepositoryNotFoundError:
            api.create_repo(repo, private=not public, exist_ok=True)
            info = api.repo_info(repo)
            history = "created just now"
        else:
            history = "which exists and is left as it is"
            if "write" in inspect.signature(api.auth_check).parameters:
                api.auth_check(repo, write=True)
    if info.private:
        return f"a private repository, {history}"
    return f"a public repository, {history}: everybody can read what is uploaded"


def push(repo: str, contents: Mapping[str, Path | bytes], *, folder: Path) -> str:
    """Upload files, given by their names in the repository, and return the commit's address.

    All go into one commit. Raises UserError if that fails; `folder` is for the message.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    advice = f"all is written to {folder}, and the same command with --resume uploads it"
    with _push_errors(repo, advice):
        operations = []
        for name, content in contents.items():
            operations.append(CommitOperationAdd(name, content))
        message = "Upload a run of minivit"
        commit = HfApi().create_commit(repo, operations, commit_message=message)
        return str(commit.commit_url)


@contextlib.contextmanager
def _push_errors(repo: str, advice: str) -> Iterator[None]:
    """Turn any failure to push into a UserError that says why, and what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: expected --push-to-hub owner/name") from error
    except Exception as error:  # The HTTP library's exceptions have no common base.
        reason = explain_failure(error, constants.ENDPOINT)
        if status_of(error) in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            reason += "; log in with `hf auth login` or HF_TOKEN as a user who may write there"
        raise UserError(
            f"{repo}: cannot push to {constants.ENDPOINT}: {reason}; {advice}"
        ) from error
