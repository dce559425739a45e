"""What comes from the Hub or goes there: its errors in words that never show a token, and names not to be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import huggingface_hub
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import errors as hub_errors


Token = str | bool | None

PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".pyc")


def is_pickle(path: str) -> bool:
    """Whether a file's name says that loading it can run code."""
    return path.lower().endswith(PICKLE_SUFFIXES)


@contextmanager
def explained(target_id: str, *, token: Token, action: str) -> Iterator[None]:
    """Turns errors of the Hub's client into ones that say what to do, without the token."""
    try:
        yield
    except Exception as error:
        translated = _translate(error, target_id, action=action)
        secrets = [secret for secret in (token, ambient_token()) if isinstance(secret, str) and secret]
        if translated is None:
            if not any(secret in str(error) for secret in secrets):
                raise
            translated = RuntimeError(str(error))
        message = str(translated)
        for secret in secrets:
            message = message.replace(secret, "[token]")
        # `from None`: the chain would print what a server chose to answer, token and all.
        raise type(translated)(message) from None


def _translate(error: Exception, target_id: str, *, action: str) -> Exception | None:
    found = hub_error(error)
    status = status_of(found)
    detail = " ".join(str(found).split())[:500]
    if isinstance(found, hub_errors.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in detail:
        return ConnectionError(
            f"Cannot {action} {target_id}: offline mode is on (HF_HUB_OFFLINE). Unset it. {in_cache(target_id)}"
        )
    if isinstance(found, hub_errors.HFValidationError):
        return ValueError(f"{target_id!r} is not a repository id such as 'user/name': {detail}")
    if isinstance(found, hub_errors.LocalTokenNotFoundError):
        return PermissionError(
            f"Cannot {action} {target_id}: not logged in. Run `hf auth login`, set HF_TOKEN, or pass `token=`."
        )
    if isinstance(found, hub_errors.GatedRepoError):
        return PermissionError(
            f"Cannot {action} {target_id}: it is gated. Open its page on the Hub, accept its terms, and use that "
            f"account's token."
        )
    if isinstance(found, hub_errors.RevisionNotFoundError):
        return FileNotFoundError(f"Cannot {action} {target_id}: there is no such revision. {detail}")
    if status == 401 and "credentials" in detail.lower():
        return PermissionError(
            f"Cannot {action} {target_id}: the token is not valid (401). Log in again with `hf auth login`. {detail}"
        )
    if isinstance(found, DatasetNotFoundError) and "gated" in detail:  # raised without its cause
        return PermissionError(
            f"Cannot {action} {target_id}: it is gated, or the token is not valid. Open its page on the Hub, accept "
            "its terms, and use that account's token."
        )
    if isinstance(found, DatasetNotFoundError) and detail.startswith("Revision"):
        return FileNotFoundError(f"Cannot {action} {target_id}: there is no such revision. {detail}")
    if isinstance(found, hub_errors.RepositoryNotFoundError | DatasetNotFoundError):
        return FileNotFoundError(
            f"Cannot {action} {target_id}: there is no such repository, or it is private and this account may not "
            "see it. Check the name; for a private one run `hf auth login`, set HF_TOKEN, or pass `token=`."
        )
    if status in (401, 403):
        needed = "write permission for this namespace" if action.startswith("publish") else "read permission for it"
        return PermissionError(
            f"Cannot {action} {target_id}: the Hub refused ({status}). The token needs {needed}. {detail}"
        )
    if isinstance(found, hub_errors.LocalEntryNotFoundError | hub_errors.CacheNotFound):
        return FileNotFoundError(
            f"Cannot {action} {target_id}: the Hub cannot be reached or was not to be asked, and what is needed is "
            f"not in the cache. {in_cache(target_id)} {detail}"
        )
    if isinstance(found, hub_errors.EntryNotFoundError):
        return FileNotFoundError(f"Cannot {action} {target_id}: a file is not there. {detail}")
    if detail.startswith("Dataset scripts are no longer supported"):
        return ValueError(
            f"Cannot {action} {target_id}: it is made by a script ({detail.split()[-1]}), and scripts are not run. If "
            "the Hub has converted it, pass `revision='refs/convert/parquet'`; otherwise run the script with an older "
            "version of datasets (3.6), and give the folder that `save_to_disk` writes."
        )
    if status is not None or is_transport_error(found):
        return ConnectionError(
            f"Cannot {action} {target_id}: {detail or type(found).__name__}. Run it again: it goes on from here."
        )
    return None


def in_cache(repo_id: str) -> str:
    """Says what of a repository is in the cache, which would serve it offline."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    found = []
    for kind in ("models", "datasets"):
        snapshots = sorted((cache / f"{kind}--{repo_id.replace('/', '--')}" / "snapshots").glob("*"))
        if snapshots:
            found.append(f"of {kind}/{repo_id} it has {', '.join(path.name for path in snapshots[:5])}")
    return f"The cache is {cache}: {'; '.join(found) if found else f'it has nothing of {repo_id}'}."


def hub_error(error: BaseException) -> BaseException:
    """The first error of the chain that tells about the Hub or the network; the client wraps some."""
    seen: BaseException | None = error
    while seen is not None:
        if status_of(seen) is not None or is_transport_error(seen) or isinstance(seen, hub_errors.HFValidationError):
            return seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, if an answer caused it."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_transport_error(error: BaseException) -> bool:
    """Whether no answer came: a connection that failed, was cut or took too long."""
    # By name, because the client's HTTP library changed between its versions (httpx, httpx2).
    names = {cls.__name__ for cls in type(error).__mro__}
    return "TransportError" in names or isinstance(error, ConnectionError | TimeoutError)


def ambient_token() -> str | None:
    """The token that the client uses when none is given."""
    return huggingface_hub.get_token()


def safe_path(folder: Path, path: object) -> Path:
    """Joins a path that came from a repository to a folder.

    Raises:
        ValueError: If it could leave the folder.
    """
    text = str(path)
    parts = PurePosixPath(text).parts
    if not isinstance(path, str) or not parts or text.startswith("/") or ".." in parts or set(text) & set("\\:\0"):
        raise ValueError(f"The path {text!r} leaves the folder of the dataset. Do not trust this repository.")
    return folder / text
