"""A folder ready for the Hub → a repository of the Hub, in one commit, checked by loading it back."""

import os
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..dseq_jepa import namespace
from ..errors import UserError
from . import cards
from .download import clear_hub_errors, hub_access, snapshot
from .verify import read_folder, verify
from .weights import sha256

FILES = ("README.md", "config.json", "model.safetensors", "pretraining.safetensors")


def push(
    folder: str | os.PathLike,
    repository: str | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> dict:
    """Create or update the repository with the folder's files; returns what was sent, and the checks after it.

    repository: ORGANISATION/NAME (default: the folder's model.tag in TIMM_DSEQ_NAMESPACE). revision: a branch, created
    if it does not exist. dry_run: only return what would be sent.
    """
    folder = Path(folder)
    config, stock, card, _ = read_folder(folder)
    name = f"{stock.dseq_name or stock.architecture}.{config['pretrained_cfg'].get('tag', 'converted')}"
    repository = repository or _default_repository(name)
    _check_name(repository)
    card = card.replace(cards.REPOSITORY.format(name=name), repository)
    sizes = {file: (folder / file).stat().st_size for file in FILES if (folder / file).is_file()}
    plan = {
        "repository": repository,
        "revision": revision or "main",
        "private": private,
        "files": {**sizes, "README.md": len(card.encode())},
        "left_behind": sorted(path.name for path in folder.iterdir() if path.name not in FILES),
        "blanks": cards.blanks(card),
    }
    if dry_run:
        return plan
    if plan["blanks"]:
        raise UserError(
            f"{folder / 'README.md'} has {len(plan['blanks'])} blanks, the first {plan['blanks'][0]}: fill in what was "
            "measured, or delete the row, then push again."
        )

    api = huggingface_hub.HfApi(library_name="timm_dseq")
    with hub_access(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations=[
                huggingface_hub.CommitOperationAdd(file, card.encode() if file == "README.md" else folder / file)
                for file in sizes
            ],
            commit_message=f"Upload {name}",
            revision=revision,
        )
    with tempfile.TemporaryDirectory() as empty_cache:
        downloaded = Path(snapshot(f"{repository}@{commit.oid}", cache_dir=empty_cache))
        checks = verify(downloaded)
        checks["arrived"] = {
            "ok": sha256(downloaded / "model.safetensors") == sha256(folder / "model.safetensors"),
            "seen": f"commit {commit.oid}",
        }
    return {**plan, "commit": commit.oid, "url": commit.commit_url, "checks": checks}


def check_pushable(repository: str) -> None:
    """Refuse, before long work whose result goes there, a repository that nobody here could push to."""
    _check_name(repository)
    with hub_access(repository):
        try:
            user = huggingface_hub.HfApi(library_name="timm_dseq").whoami()
        except LocalTokenNotFoundError as error:
            raise UserError(f"{repository}: nobody is logged in: hf auth login, or set HF_TOKEN.") from error
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if repository.partition("/")[0] not in owners:
        raise UserError(
            f"{repository}: {user['name']}, who is logged in, is no member of that organisation: name a repository "
            f"of {' or '.join(owners)}."
        )


def _check_name(repository: str) -> None:
    with clear_hub_errors(repository):
        validate_repo_id(repository)
    if "/" not in repository:
        raise UserError(f"{repository} names no organisation or user: write ORGANISATION/{repository}.")


def _default_repository(name: str) -> str:
    owner = namespace()
    if not owner:
        raise UserError("Name the repository: timm-dseq push DIR ORGANISATION/NAME, or set TIMM_DSEQ_NAMESPACE.")
    return f"{owner}/{name}"
