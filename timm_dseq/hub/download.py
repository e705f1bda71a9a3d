"""Downloads from the Hugging Face Hub: complete or not at all; a failure is one line that says how to mend it."""

import errno
import queue
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub import errors as hub_errors

from ..errors import UserError
from .weights import check_safetensors, sha256

Result = TypeVar("Result")
SECONDS = 5  # in which the Hub has to answer at all
LOOK = 5.0  # seconds between two looks at a download
PATIENCE, LEAST = 60, 1024  # after so many seconds with fewer bytes a second a download is given up
LONG, BUSY = 600, 0.05  # the same for work that also computes, and the share of a core that shows that it does


def split_revision(repo: str) -> tuple[str, str | None]:
    """organisation/name@revision → ("organisation/name", "revision", or None without one)."""
    repo_id, _, revision = repo.partition("@")
    return repo_id, revision or None


@contextmanager
def hub_access(what: str) -> Iterator[None]:
    """For whatever may ask the Hub: clear errors, and a Hub that does not answer costs a few seconds.

    huggingface_hub and timm ask an unreachable Hub again and again, for up to a minute. So it is asked once here, and
    if no answer comes, what follows runs as with HF_HUB_OFFLINE=1: from the cache.
    """
    with clear_hub_errors(what):
        fault = None if constants.HF_HUB_OFFLINE else unreachable()
        if fault is None:
            yield
            return
        _check_endpoint()
        try:
            with _offline():
                yield
        except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
            cached = isinstance(error, hub_errors.LocalEntryNotFoundError)
            raise UserError(
                f"{what} {'is not in the cache' if cached else 'needs the network'}, and the Hub cannot be reached: "
                f"check the network, HF_ENDPOINT and proxies, then try again ({fault})."
            ) from error


def unreachable() -> str | None:
    """Why the Hub cannot be reached; None if it answers, whatever it says.

    Asked in a thread, since neither library bounds the time in which a name server has to answer.
    """
    answers: queue.Queue[str | None] = queue.Queue()

    def ask() -> None:
        try:
            huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.put(None)
        except Exception as error:  # httpx and requests have no common base
            answers.put(f"{constants.ENDPOINT}: {_first_line(error)}")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=SECONDS)
    except queue.Empty:
        return f"{constants.ENDPOINT}: no answer in {SECONDS} s"


@contextmanager
def _offline() -> Iterator[None]:
    """HF_HUB_OFFLINE=1 for a while."""
    # before huggingface_hub 1.0 a session keeps the mode it was made in
    renew_sessions = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    constants.HF_HUB_OFFLINE = True
    renew_sessions()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False
        renew_sessions()


@contextmanager
def clear_hub_errors(what: str) -> Iterator[None]:
    """Turn an error of the Hub, the network or the disk into one line that names what is wrong and how to mend it."""
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
        if constants.HF_HUB_OFFLINE:
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
    except urllib.error.URLError as error:  # weights of timm that are not on the Hub
        raise UserError(f"{what}: the download failed ({error.reason}): check the network, then try again.") from error
    except OSError as error:  # the Hub refused, the network or the download broke, the disk is full
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{what}: your token may not do this: log in with one that may (hf auth login).") from error
        if status == 404:
            raise UserError(f"{what}: the Hub knows no such organisation or repository: check its name.") from error
        if status:
            raise UserError(f"{what}: the Hub answered {status}: try again later.") from error
        if error.errno == errno.ENOSPC:
            raise UserError(f"{what}: no space left on the disk: free some, or set HF_HOME elsewhere.") from error
        if error.filename:  # a path of this machine, not the network's
            reason = error.strerror or type(error).__name__
            raise UserError(
                f"{error.filename} cannot be used ({reason}): set HF_HOME or cache_dir to a folder that can be written."
            ) from error
        _check_endpoint()
        raise UserError(f"{what} did not arrive whole ({_first_line(error)}): try again.") from error
    except Exception as error:  # httpx and requests have no common base below Exception
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "requests", "urllib3", "httpcore"):
            raise
        _check_endpoint()
        raise UserError(f"{what}: the connection failed ({_first_line(error)}): try again.") from error


def _check_endpoint() -> None:
    """After a failure of the network: name HF_ENDPOINT if it is no address."""
    if not re.match(r"https?://[^/]", constants.ENDPOINT):
        raise UserError(f"HF_ENDPOINT={constants.ENDPOINT!r} is no address: begin it with https://, or unset it.")


def download(repo: str, filename: str, cache_dir: str | PathLike | None = None) -> str:
    """The cached path of a file of "organisation/name@revision", complete and with the checksum the Hub announced."""
    repo_id, revision = split_revision(repo)
    what = f"{filename} of {repo}"
    with hub_access(what):
        options = {"revision": revision, "cache_dir": cache_dir, "library_name": "timm_dseq"}
        work = partial(huggingface_hub.hf_hub_download, repo_id, filename, **options)
        path = patiently(work, what, excess=_Excess(repo_id, filename, revision, cache_dir))
    _check_file(Path(path), what)
    return path


class _Excess:
    """Called now and then: whether more of a file has arrived than the Hub has announced."""

    def __init__(self, repo_id: str, filename: str, revision: str | None, cache_dir: str | PathLike | None) -> None:
        self.url = huggingface_hub.hf_hub_url(repo_id, filename, revision=revision)
        folder = file_download.repo_folder_name(repo_id=repo_id, repo_type="model")
        self.blobs = Path(cache_dir or constants.HF_HUB_CACHE, folder, "blobs")

    @cached_property
    def announced(self) -> float:
        try:
            return huggingface_hub.get_hf_file_metadata(self.url).size or float("inf")
        except Exception:  # the download itself says what is wrong
            return float("inf")

    def __call__(self) -> bool:
        arrived = [path.stat().st_size for path in self.blobs.glob("*.incomplete")]
        return max(arrived, default=0) > self.announced


def snapshot(repo: str, cache_dir: str | PathLike | None = None) -> str:
    """The cached folder of "organisation/name@revision", every file of it checked as `download` does."""
    repo_id, revision = split_revision(repo)
    with hub_access(repo):
        options = {"revision": revision, "cache_dir": cache_dir, "library_name": "timm_dseq"}
        folder = patiently(partial(huggingface_hub.snapshot_download, repo_id, **options), repo)
    faults = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            try:
                _check_file(path, f"{path.relative_to(folder)} of {repo}")
            except UserError as error:  # go on: every damaged file has to be removed, or the next try fails at the next
                faults.append(error)
    if faults:
        raise faults[0]
    return folder


def patiently(
    work: Callable[[], Result],
    what: str,
    mend: str | Callable[[], str] = "check the network, HF_ENDPOINT and proxies, then try again",
    excess: Callable[[], bool] | None = None,
    computing: bool = False,
    received: Callable[[], int | None] | None = None,
) -> Result:
    """What `work` returns, if it ends, or goes on to receive something.

    computing: it also computes, or waits at a lock for another process that does: that is no silence, or a long one.
    received: the bytes that have arrived of it so far; without it those that this machine has received.

    huggingface_hub bounds each read, and repeats what failed: a server that sends a byte now and then, or takes every
    connection and is silent, would hold it for many minutes. So it works in a thread, which is left to itself if no
    more arrives, or more than there is (`excess` tells, asked every LOOK seconds).
    """
    answers: queue.Queue[tuple[Result | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    patience = LONG if computing else PATIENCE
    received = received or _received
    before, since, spent = received(), time.monotonic(), time.process_time()
    while True:
        try:
            answer, error = answers.get(timeout=min(LOOK, patience))
        except queue.Empty:
            if excess is not None and excess():
                raise UserError(f"{what}: more arrives than was announced: {mend}.") from None
            if time.monotonic() - since < patience:
                continue
            busy = computing and time.process_time() - spent > BUSY * patience
            now, since, spent = received(), time.monotonic(), time.process_time()
            # fewer than before: it has begun anew
            if now is not None and 0 <= now - before < LEAST * patience and not busy:
                break
            before = now
            continue
        if error is not None:
            raise error
        return answer
    raise UserError(f"{what}: nothing more arrived for {patience} s: {mend if isinstance(mend, str) else mend()}.")


def _received() -> int | None:
    """Bytes that this machine has received so far, from itself only if the Hub is here; None where no system tells.

    The files do not tell: both ways in which huggingface_hub downloads write them in pieces of many megabytes.
    """
    try:
        lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()[2:]
        counts = {name.strip(): int(numbers.split()[0]) for name, _, numbers in (line.partition(":") for line in lines)}
        return sum(counts.values()) - (0 if _through_loopback() else counts.get("lo", 0))
    except (OSError, ValueError, IndexError):
        return None


def _through_loopback() -> bool:
    """Whether the Hub, or a proxy on the way to it, is on this machine."""
    hosts = {urlsplit(address).hostname for address in (constants.ENDPOINT, *urllib.request.getproxies().values())}
    return any(host in ("localhost", "::1", socket.gethostname()) or (host or "").startswith("127.") for host in hosts)


def _check_file(path: Path, what: str) -> None:
    """Remove a cached file that is damaged, and say so: the next try downloads it again.

    The file's name in the cache is what the Hub called it. A name that leads out of the repository's own folder is not
    followed: whatever lies there is somebody else's.
    """
    own = next((parent.parent for parent in path.parents if parent.name == "snapshots"), path.parent)
    if not path.resolve().is_relative_to(own.resolve()):
        path.unlink()
        raise UserError(f"{what}: the answer names a file outside the cache: {constants.ENDPOINT} is no Hub to trust.")
    try:
        _check_digest(path, what)
        check_safetensors(path)
    except UserError:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def _check_digest(path: Path, what: str) -> None:
    """Compare a cached file with the SHA-256 in its name, once.

    huggingface_hub compares sizes only when it downloads; its verify_repo_checksums (since 1.1) needs the network and
    reads every file each time. Large files lie in the cache as blobs/SHA256, with a link to them. A note of size and
    time remembers the check. Where the cache has no links (some Windows set-ups) there is nothing to compare with.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or len(blob.name) != 64:
        return
    state = f"{blob.stat().st_size} {blob.stat().st_mtime_ns}"
    note = blob.parent.parent / ".verified" / blob.name
    if note.is_file() and note.read_text(encoding="utf-8") == state:
        return
    if sha256(blob) != blob.name:
        raise UserError(f"{what} arrived damaged (its SHA-256 is not the announced one), so it was removed: try again.")
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(state, encoding="utf-8")
    except OSError:  # a cache that others own and we may only read: compare again next time
        pass


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
