"""The Hugging Face Hub: weights come down whole or not at all, folders go up in one commit."""

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ..errors import UserError
from .weights import check_safetensors


def split_revision(repo: str) -> tuple[str, str | None]:
    """organisation/name@revision → ("organisation/name", "revision", or None without one)."""
    repo_id, _, revision = repo.partition("@")
    return repo_id, revision or None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever the Hub, the network or the disk answers into one line that names the culprit and the mend."""
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise UserError(f"{what} is gated: accept its terms on the Hub, then log in (hf auth login).") from error
    except hub_errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the repository has no such revision: check what stands after the @.") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: no such repository, or a private one: check its name, and log in if it is yours (hf auth login)."
        ) from error
    except hub_errors.LocalEntryNotFoundError as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            mend = ": unset HF_HUB_OFFLINE to download it"
        else:
            mend = ", and the Hub cannot be reached: check the network, HF_ENDPOINT and proxies, then try again"
        raise UserError(f"{what} is not in the cache{mend}.") from error
    except hub_errors.EntryNotFoundError as error:
        raise UserError(f"{what}: the repository has no such file: it may not be a timm-dseq export.") from error
    except hub_errors.HFValidationError as error:
        raise UserError(f"{what} is no repository of the Hub: write ORGANISATION/NAME.") from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise UserError(f"{what} needs the network: unset HF_HUB_OFFLINE.") from error
    except OSError as error:  # the Hub's refusals, network errors, a download that broke off, the disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{what}: your token may not do this: log in with one that may (hf auth login).") from error
        if status == 404:
            raise UserError(f"{what}: the Hub knows no such organisation or repository: check its name.") from error
        if status:
            raise UserError(f"{what}: the Hub answered {status}: try again later.") from error
        if error.errno == errno.ENOSPC:
            raise UserError(f"{what}: no space left on the disk: free some, or set HF_HOME elsewhere.") from error
        if error.filename:  # a place of this machine, not the network's
            fault = error.strerror or type(error).__name__
            raise UserError(
                f"{error.filename} cannot be used ({fault}): set HF_HOME or cache_dir to a folder that can be written."
            ) from error
        _check_endpoint(error)
        raise UserError(f"{what} did not arrive whole ({_first_line(error)}): try again.") from error
    except Exception as error:  # httpx and requests have no common base below Exception
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "requests", "urllib3", "httpcore"):
            raise
        _check_endpoint(error)
        raise UserError(f"{what}: the connection failed ({_first_line(error)}): try again.") from error


def _check_endpoint(error: Exception) -> None:
    """A failure of the network is the fault of the address that was set, where that is none."""
    endpoint = huggingface_hub.constants.ENDPOINT
    if not re.match(r"https?://[^/]", endpoint):
        raise UserError(f"HF_ENDPOINT={endpoint!r} is no address: begin it with https://, or unset it.") from error


def download(repo: str, filename: str, cache_dir: str | PathLike | None = None) -> str:
    """The cached path of a file of "organisation/name@revision", complete and with the checksum the Hub announced."""
    repo_id, revision = split_revision(repo)
    what = f"{filename} of {repo}"
    with explained(what):
        path = huggingface_hub.hf_hub_download(
            repo_id, filename, revision=revision, cache_dir=cache_dir, library_name="timm_dseq"
        )
    _check_arrived(Path(path), what)
    return path


def snapshot(repo: str, cache_dir: str | PathLike | None = None) -> str:
    """The cached folder of "organisation/name@revision", every file of it checked as `download` does."""
    repo_id, revision = split_revision(repo)
    with explained(repo):
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, library_name="timm_dseq"
        )
    damage = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            try:
                _check_arrived(path, f"{path.relative_to(folder)} of {repo}")
            except UserError as error:  # every damaged file has to go, or the next try would meet the next one
                damage.append(error)
    if damage:
        raise damage[0]
    return folder


def _check_arrived(path: Path, what: str) -> None:
    """Remove a cached file that is damaged, and say so: the next try downloads it anew."""
    try:
        _check_digest(path, what)
        check_safetensors(path)
    except UserError:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def _check_digest(path: Path, what: str) -> None:
    """Compare a cached file with the SHA-256 it is named after, once: no library does.

    Large files lie in the cache as blobs/SHA256, with a link to them. A note of size and time remembers the check.
    Where the cache has no links (some Windows set-ups) there is no digest to compare with.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or len(blob.name) != 64:
        return
    seen = f"{blob.stat().st_size} {blob.stat().st_mtime_ns}"
    note = blob.parent.parent / ".verified" / blob.name
    if note.is_file() and note.read_text() == seen:
        return
    if _sha256(blob) != blob.name:
        raise UserError(f"{what} arrived damaged (its SHA-256 is not the announced one), so it was removed: try again.")
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(seen)
    except OSError:  # a cache that others own and we may only read: compare again next time
        pass


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
