"""The checkpoints of a run: when one is due, what it holds, and whether a run may be resumed from it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from timm_dseq import UserError

from ..system.numbers import Count
from . import checkpoints, lock
from .export import blocked
from .room import check_room
from .state import collect, misfit, restore

_MISSING = object()  # where there is no such setting


@dataclass
class Checkpoint:
    """When the run is saved.

    Args:
        every: steps between checkpoints
        keep: newest checkpoints that stay
        keep_every: checkpoints whose step is a multiple of this stay for ever
    """

    every: Count = 625
    keep: Count = 2
    keep_every: Count | None = None


class Settings(Protocol):
    """What the settings of every kind of run have; they are a dataclass of values and dataclasses."""

    output_dir: str
    resume: str
    dry_run: bool
    checkpoint: Checkpoint
    optim: Any  # with max_skipped: the steps in a row that may be not finite


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    samples: int = 0
    broken: int = 0  # images that could not be read
    skipped: int = 0  # steps in a row that were not finite
    streams: list[dict[str, Any]] = field(default_factory=list)  # each process's position in a streamed data set
    chosen: dict[str, Any] = field(default_factory=dict)  # what settings that were `auto` became when the run began


def fault_of(state: Any, path: str) -> str | None:
    """What is wrong with the content of a checkpoint's state.json; None if a run can go on from it."""
    done = state.get("done") if isinstance(state, dict) else None
    if not isinstance(done, dict) or not isinstance(state.get("config"), dict) or "data" not in state:
        return f"{path}/{checkpoints.STATE} does not describe a run: take another checkpoint."
    known = vars(Progress())
    if later := sorted(done.keys() - known.keys()):
        return f"{path} was written by a later version of this program ({later[0]}): resume with that one."
    for name, value in done.items():
        fits = type(value) is type(known[name]) and (not isinstance(value, int) or value >= 0)
        if not fits:
            return f"{path}/{checkpoints.STATE} says {name}: {value!r}, which cannot be: take another checkpoint."
    return None


class RunCheckpoints:
    """Saves a run, and resumes it."""

    def __init__(
        self,
        config: Settings,
        text: str,
        accelerator: Accelerator,
        free: tuple[str, ...] = (),
        automatic: tuple[str, ...] = (),
        added: dict[str, Any] | None = None,
    ) -> None:
        """text: the settings as YAML. free: settings, or sections of them, that may differ when a run is resumed.
        automatic: settings that may be `auto`; the last part of such a name is its key in `Progress.chosen`.
        added: settings that older checkpoints do not know, and the values that their runs had."""
        self.config, self.text, self.accelerator = config, text, accelerator
        self.free, self.automatic, self.added = free, automatic, added or {}
        self.output = Path(config.output_dir)
        self.folder = self.output / "checkpoints"
        self.path: str | None = None  # of the checkpoint to resume from
        self.state: dict[str, Any] = {}  # its state.json
        self.data = ""  # the fingerprint of the data set

    def due(self, step: int) -> bool:
        """Whether this step's checkpoint is one of those that are written at intervals."""
        return step % self.config.checkpoint.every == 0 and not self.config.dry_run

    def newest(self) -> Path:
        """The newest checkpoint's folder."""
        return checkpoints.steps(self.folder)[-1]

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        stream: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint of this step, and remove those that are too old. All processes have to call it.

        stream: this process's position in a streamed data set.
        """
        if self.config.dry_run:
            return
        progress.streams = gather_object([stream]) if stream else []
        main = self.accelerator.is_main_process
        weights, moments = collect(model, optimizer, keep=main)
        if main:
            state = {"done": asdict(progress), "config": asdict(self.config), "data": self.data}
            checkpoints.save(self.folder, progress.step, checkpoints.Saved(weights, moments, state))
            checkpoints.prune(self.folder, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        self.accelerator.wait_for_everyone()

    def find(self) -> Progress:
        """How far the run to be resumed is. Nothing else is read of its checkpoint; `resume` follows."""
        answer: list[Any] = [None]
        if self.accelerator.is_main_process:
            path, error = self._choose()
            state = None if error or path is None else checkpoints.state_of(Path(path))
            answer = [(path, error or (path and fault_of(state, path)), state)]
        broadcast_object_list(answer)
        self.path, error, state = answer[0]
        if error:
            raise UserError(error)
        if self.path is None:
            return Progress()
        self._check_visible(Path(self.path) / checkpoints.MANIFEST)
        self.state = state
        return Progress(**state["done"])

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: str) -> None:
        """Load the checkpoint that `find` chose; a run that begins writes its settings to config.yaml instead.

        data: the fingerprint of the data set.
        """
        self.data = data
        check_room(self.output, self.folder, model, optimizer, self.config.checkpoint.keep)
        if self.path is None:
            if not self.config.dry_run:
                if self.accelerator.is_main_process:
                    self._begin()
                self.accelerator.wait_for_everyone()
                self._check_visible(self.output / "config.yaml")
            return
        self._check_settings()
        self._check_data()
        saved = checkpoints.load(Path(self.path))
        if fault := misfit(model, optimizer, saved.model, saved.optimizer):
            raise UserError(f"{self.path} is no checkpoint of this model ({fault}): take another one.")
        if self.accelerator.is_main_process and not self.config.dry_run:
            self._step_back()
        self.accelerator.wait_for_everyone()
        restore(model, optimizer, saved.model, saved.optimizer)

    def _choose(self) -> tuple[str | None, str | None]:
        """The checkpoint to resume from, if any, or an error."""
        if fault := blocked(self.output):
            return None, fault
        asked = self.config.resume
        if asked == "never":
            return None, None
        if asked == "auto":
            path, skipped = checkpoints.newest(self.folder)
            for line in skipped:
                print(f"passed over {line}", flush=True)
            if skipped and path is None:
                return None, (
                    f"no checkpoint in {self.folder} is complete: start anew with --resume never, or restore one."
                )
            return (str(path) if path else None), None
        if not (Path(asked) / checkpoints.MANIFEST).is_file():
            return None, f"--resume {asked} is no checkpoint: give auto, never, or a folder …/checkpoints/step-…."
        fault = checkpoints.fault(Path(asked))
        return asked, f"--resume {asked}: {fault}. Take another checkpoint." if fault else None

    def _step_back(self) -> None:
        """What the checkpoint that was asked for does not lead to steps aside: it is the run's truth from here on."""
        path, others = Path(self.path).resolve(), checkpoints.steps(self.folder)
        if path.parent == self.folder.resolve():
            others = [own for own in others if checkpoints.number(own) > checkpoints.number(path)]
        if others:
            earlier = self._aside(others)
            print(f"checkpoints that {self.path} did not lead to are now in {earlier}", flush=True)

    def _begin(self) -> None:
        """Move an earlier run out of the way, and write down the settings of this one."""
        if self.folder.exists() or (self.output / "log.jsonl").exists():
            earlier = self._aside([p for p in self.output.iterdir() if not p.name.startswith(("earlier-", lock.NAME))])
            print(f"the run that was in {self.output} is now in {earlier}", flush=True)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(self.text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir={self.output} cannot be written ({error.strerror}): name another.") from error

    def _aside(self, paths: list[Path]) -> Path:
        """Move files and folders of the run into a new folder earlier-N, where they keep their places."""
        taken = [int(part) for p in self.output.glob("earlier-*") if (part := p.name[len("earlier-") :]).isdecimal()]
        earlier = self.output / f"earlier-{max(taken, default=0) + 1}"
        try:
            for path in paths:
                place = earlier / path.relative_to(self.output)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.rename(place)
        except OSError as error:
            raise UserError(f"{earlier} cannot be written ({error.strerror}): name another output_dir.") from error
        return earlier

    def _check_visible(self, path: Path) -> None:
        """Refuse a folder that some process does not see. All processes have to call it, and all of them end."""
        if not all(gather_object([path.is_file()])):
            raise UserError(
                f"output_dir={self.config.output_dir} has to be on a disk that all nodes share, and an absolute path "
                f"where they begin in other folders: some process does not see {path}."
            )

    def _check_settings(self) -> None:
        """Refuse to resume with settings that change the run."""
        for name, before, now in self._compared(self.state["config"], self.config):
            if name.startswith(self.free) or before == now or self._unchanged(name, now):
                continue
            if _MISSING in (before, now):
                verb = "had no" if before is _MISSING else "had a"
                raise UserError(
                    f"{self.path} was written by another version of this program, which {verb} {name}: resume with "
                    "that one, or start anew with --resume never."
                )
            raise UserError(
                f"{name} was {before} in {self.path} and is {now} now: change it back, or start anew with --resume "
                "never or another output_dir."
            )

    def _compared(self, before: dict[str, Any], config: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
        """Name, value in the checkpoint and value now of every setting in this dataclass."""
        for name in sorted({*before, *vars(config)}):
            old = before.get(name, self.added.get(above + name, _MISSING))
            now = getattr(config, name, _MISSING)
            if is_dataclass(now):
                yield from self._compared({} if old is _MISSING else old, now, f"{above}{name}.")
            else:
                yield above + name, old, now if now is _MISSING else json.loads(json.dumps(now))

    def _unchanged(self, name: str, now: Any) -> bool:
        """Whether an automatic setting is still `auto`, or names what the run has chosen."""
        if name not in self.automatic:
            return False
        chosen = self.state["done"].get("chosen", {}).get(name.rpartition(".")[2])
        return now in ("auto", chosen) or (isinstance(now, bool) and now == bool(chosen))

    def _check_data(self) -> None:
        """Refuse to resume with other images, or to share a stream out to another number of processes."""
        streams = self.state["done"]["streams"]
        if streams and len(streams) != self.accelerator.num_processes:
            raise UserError(
                f"a streamed data set goes on with the processes it began with: take {len(streams)}, or start anew "
                "with --resume never."
            )
        known = self.data.split()[: len(self.state["data"].split())]  # older checkpoints of fine-tuning lack the labels
        if self.state["data"].split() != known:
            raise UserError(
                f"data.path holds other images or labels than when {self.path} was written: bring those "
                "back, or start anew with --resume never."
            )
