"""One push to the Hugging Face Hub: one commit, retried, resumable, with errors that never show a token.

Shards are uploaded before the commit, where what is stored already is not sent again, and nothing is visible before
the commit. So a push that was cut, or lost a race, is simply made again. The same content makes no commit at all.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..data.shards import file_sha256
from ..utils.files import reading
from ..utils.safety import Token, ambient_token, hub_error, is_pickle, is_transport_error, status_of
from ..utils.values import plain_fields


logger = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts, doubled each time
LARGEST_GIT_FILE = 10 * 2**20  # bytes; what is larger is always stored by LFS
RETRIED = {408, 409, 412, 425, 429, 500, 502, 503, 504}
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
TEXT_SUFFIXES = (".md", ".json", ".py", ".txt", ".yaml")


@dataclass(frozen=True)
class PublishResult:
    """What a push did, or with `dry_run` what it would do.

    Args:
        repo_id: Full id of the repository.
        url: Address of the repository, or of the pull request.
        revision: Branch pushed to, or the reference of the pull request.
        commit: Id of the new commit; `None` if nothing was committed.
        added: Paths of new and changed files.
        deleted: Paths of removed files.
        unchanged: Paths of files that are in the repository already.
        num_bytes: Size of the files in `added`.
        dry_run: Whether nothing was sent.
        compared: Whether the repository was read; a dry run without network or token tells of all files.
    """

    repo_id: str
    url: str
    revision: str
    commit: str | None
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    unchanged: tuple[str, ...]
    num_bytes: int
    dry_run: bool = False
    compared: bool = True

    def __str__(self) -> str:
        """One line, or with changes one per file."""
        if not self.added and not self.deleted:
            return f"{self.url}: up to date ({len(self.unchanged)} files)"
        verb = "would send" if self.dry_run else "sent"
        sent = f"{verb} {len(self.added)} files ({self.num_bytes / 2**20:.1f} MiB)"
        lines = [f"{self.url}: {sent}, {len(self.unchanged)} unchanged"]
        if not self.compared:
            lines.append("  not compared with the repository, which cannot be read from here: all files are listed")
        return "\n".join([*lines, *(f"  + {path}" for path in self.added), *(f"  - {path}" for path in self.deleted)])


@dataclass(frozen=True)
class Remote:
    """A repository as it is before a push."""

    head: str | None
    has_branch: bool
    files: Mapping[str, str]  # path -> SHA-256 of an LFS file, git id of another
    read: Callable[[str], str | None]


NOTHING = Remote(None, False, {}, lambda path: None)


@dataclass(frozen=True)
class PushOptions:
    """How something is sent to the Hub, whatever it is; names as in `huggingface_hub`.

    Attributes:
        token: Token with write permission; the one of `hf auth login` if `None`.
        private: Whether a new repository is private; an existing one stays as it is.
        revision: Branch to push to, made if it is missing; `main` if `None`.
        create_pr: Whether to open a pull request instead of pushing to `main`.
        commit_message: Title of the commit.
        commit_description: Further text of the commit.
        dry_run: Whether to stop before anything is sent; the result tells what would be.
        max_retries: Further attempts after a conflict (409, 412) or a passing error (429, 5xx, cut connection).
    """

    token: Token = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    commit_description: str | None = None
    dry_run: bool = False
    max_retries: int = 5

    field_limits = {"max_retries": 0}

    def __post_init__(self) -> None:
        """Checks where to push to, before anything is read or sent."""
        plain_fields(self)
        if not isinstance(self.revision, str | None):
            raise ValueError(f"`revision` must be the name of a branch, got {self.revision!r}.")
        if self.create_pr and self.revision not in (None, "main"):
            raise ValueError(
                f"A pull request is opened against 'main', but revision is {self.revision!r}. Leave one of them out."
            )


@dataclass(frozen=True)
class Target:
    """Where to push, and how."""

    api: HfApi
    repo_id: str
    repo_type: str
    options: PushOptions

    @property
    def revision(self) -> str:
        """The branch."""
        return self.options.revision or "main"


def read_remote(target: Target) -> Remote:
    """Reads the head and the files of a repository; what it would start from where it or the branch is missing."""
    api, has_branch = target.api, True
    try:
        info = api.repo_info(target.repo_id, repo_type=target.repo_type, revision=target.revision)
    except hub_errors.RevisionNotFoundError:
        info, has_branch = api.repo_info(target.repo_id, repo_type=target.repo_type), False
    except hub_errors.RepositoryNotFoundError as error:
        if isinstance(error, hub_errors.GatedRepoError) or "credentials" in str(error).lower():
            raise
        return NOTHING
    head = str(info.sha)
    entries = api.list_repo_tree(target.repo_id, repo_type=target.repo_type, revision=head, recursive=True)
    files = {
        entry.path: (entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if isinstance(entry, huggingface_hub.hf_api.RepoFile)
    }

    def read(path: str) -> str | None:
        if path not in files:
            return None
        local = api.hf_hub_download(target.repo_id, path, repo_type=target.repo_type, revision=head)
        with reading(Path(path), f"Correct or delete it in {target.repo_id}."):
            return Path(local).read_text(encoding="utf-8")

    return Remote(head, has_branch, files, read)


def send(
    target: Target, folder: Path, prepare: Callable[[Path, Remote], Sequence[str]], commit_message: str
) -> PublishResult:
    """Makes the repository hold what is in `folder`, in one commit on top of the head that `prepare` saw.

    `prepare` writes what depends on the repository (the merged card) into the folder, and returns paths to delete.
    Conflicts and passing errors are met by further attempts, with growing pauses; a refusal never is.

    Raises:
        ValueError: If a file must not be published. Errors of `prepare` and of the Hub's client are passed on.
    """
    for retry in itertools.count():
        try:
            return _send_once(target, folder, prepare, commit_message)
        except Exception as error:
            found = hub_error(error)
            passing = status_of(found) in RETRIED or (status_of(found) is None and is_transport_error(found))
            offline = isinstance(found, hub_errors.OfflineModeIsEnabled)
            if not passing or offline or retry == target.options.max_retries:
                raise
            stated = getattr(getattr(found, "response", None), "headers", {}).get("Retry-After", "")
            wait = min(LONGEST_WAIT, float(stated) if str(stated).isdigit() else FIRST_WAIT * 2**retry)
            logger.warning(
                "Publishing to %s: attempt %d failed (%s); again in %.1f s.",
                target.repo_id, retry + 1, status_of(found) or type(found).__name__, wait,
            )  # fmt: skip
            time.sleep(wait)
    raise AssertionError("unreachable")


def _send_once(
    target: Target, folder: Path, prepare: Callable[[Path, Remote], Sequence[str]], commit_message: str
) -> PublishResult:
    compared, options, api = True, target.options, target.api
    try:
        remote = read_remote(target)
    except Exception as error:
        if not options.dry_run or not _unreadable(error):
            raise
        remote, compared = NOTHING, False
    planned = _plan(target, folder, remote, prepare(folder, remote))
    if options.dry_run:
        return replace(planned, dry_run=True, compared=compared)
    if not remote.has_branch:
        place: dict[str, Any] = {"repo_id": target.repo_id, "repo_type": target.repo_type, "exist_ok": True}
        if remote.head is None:
            api.create_repo(**place, private=options.private)
        if target.revision != "main":
            api.create_branch(**place, branch=target.revision)
        remote = read_remote(target)
        planned = _plan(target, folder, remote, prepare(folder, remote))
    if not (planned.added or planned.deleted):
        return planned
    additions = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(folder / path)) for path in planned.added]
    deletions = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in planned.deleted]
    commit = api.create_commit(
        target.repo_id, [*additions, *deletions], repo_type=target.repo_type, revision=target.revision,
        commit_message=options.commit_message or commit_message, commit_description=options.commit_description,
        create_pr=options.create_pr, parent_commit=remote.head,
    )  # fmt: skip
    if commit.pr_url:
        return replace(planned, commit=commit.oid, url=commit.pr_url, revision=str(commit.pr_revision))
    return replace(planned, commit=commit.oid)


def _unreadable(error: Exception) -> bool:
    """Whether the Hub was out of reach, or wants a token that is not there: no reason to say nothing of the files."""
    found = hub_error(error)
    offline = isinstance(found, hub_errors.OfflineModeIsEnabled) or is_transport_error(found)
    return offline or status_of(found) in (401, 403)


def _plan(target: Target, folder: Path, remote: Remote, deleted: Sequence[str]) -> PublishResult:
    """What a push would do; raises if a file must not be published."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    refuse_secrets(folder, paths, target.options.token)
    if pickles := [path for path in paths if is_pickle(path)]:
        raise ValueError(f"{pickles[0]} is a pickle file, which can run code when loaded. Save it as safetensors.")
    unchanged = [path for path in paths if path in remote.files and _is_stored(folder / path, remote.files[path])]
    added = [path for path in paths if path not in unchanged]
    return PublishResult(
        repo_id=target.repo_id,
        url=f"{target.api.endpoint}/{'datasets/' if target.repo_type == 'dataset' else ''}{target.repo_id}",
        revision=target.revision,
        commit=None,
        added=tuple(added),
        deleted=tuple(sorted(set(deleted) & set(remote.files))),
        unchanged=tuple(unchanged),
        num_bytes=sum((folder / path).stat().st_size for path in added),
    )


def _is_stored(path: Path, oid: str) -> bool:
    """Whether a file is the one of that id: an LFS object's, or a git blob's where it is not larger than those are."""
    small = path.stat().st_size <= LARGEST_GIT_FILE
    return oid == file_sha256(path) or (small and oid == git_hash(path.read_bytes()))


def refuse_secrets(folder: Path, paths: Sequence[str], token: Token) -> None:
    """Raises if a text file to be sent contains an access token."""
    secrets = [secret for secret in (token, ambient_token()) if isinstance(secret, str) and len(secret) >= 8]
    for path in paths:
        if path.endswith(TEXT_SUFFIXES):
            text = (folder / path).read_text(encoding="utf-8", errors="replace")
            if SECRET.search(text) or any(secret in text for secret in secrets):
                raise ValueError(
                    f"{path} contains an access token of the Hub, so nothing was sent. Remove it from the records."
                )


def make_target(repo_id: str, repo_type: str, options: PushOptions) -> Target:
    """Checks a repository id, before anything is read or sent; your own name is put before a bare one."""
    if not isinstance(repo_id, str):
        raise ValueError(f"The repository id must be text such as 'user/name', got {repo_id!r}.")
    validate_repo_id(repo_id)
    api = HfApi(token=options.token, library_name="dsco_hf")
    if "/" not in repo_id and not options.dry_run:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    return Target(api, repo_id, repo_type, options)
