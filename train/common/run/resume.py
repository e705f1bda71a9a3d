"""A run's checkpoints: when one is due, what is in it, and whether a run may go on from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from jsonargparse.typing import PositiveInt

from timm_dseq import UserError

from ..system.command_line import flat
from . import checkpoints
from .state import collect, restore


@dataclass
class Checkpoint:
    """When the run is saved.

    Args:
        every: steps between checkpoints
        keep: newest checkpoints that stay
        keep_every: checkpoints whose step is a multiple of this stay for ever
    """

    every: PositiveInt = 625
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None


class Settings(Protocol):
    """What the settings of every kind of run have (they are a dataclass)."""

    output_dir: str
    resume: str
    dry_run: bool
    checkpoint: Checkpoint


@dataclass
class Done:
    """How far a run is."""

    step: int = 0
    samples: int = 0
    broken: int = 0  # images that could not be read
    skipped: int = 0  # steps in a row that were not finite
    streams: list[dict[str, Any]] = field(default_factory=list)  # of a streamed data set: where each process is
    chosen: dict[str, Any] = field(default_factory=dict)  # what settings that were `auto` became when the run began


class Keeper:
    """Saves and restores one run."""

    def __init__(
        self,
        config: Settings,
        text: str,
        accelerator: Accelerator,
        free: tuple[str, ...] = (),
        automatic: tuple[str, ...] = (),
    ) -> None:
        """text: the settings as YAML. free: settings, or sections of them, that may differ when a run is resumed.
        automatic: settings that may be `auto`; the last part of such a name is its key in `Done.chosen`."""
        self.config, self.text, self.accelerator = config, text, accelerator
        self.free, self.automatic = free, automatic
        self.output = Path(config.output_dir)
        self.folder = self.output / "checkpoints"
        self.path: str | None = None  # of the checkpoint to go on from
        self.state: dict[str, Any] = {}  # and what stands in it beside tensors
        self.data = ""  # the fingerprint of the data set

    def due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 and not self.config.dry_run

    def newest(self) -> Path:
        return checkpoints.steps(self.folder)[-1]

    def save(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, done: Done, stream: dict[str, Any] | None
    ) -> None:
        """Write a checkpoint of this step, and remove those that are too old. All processes have to call it."""
        if self.config.dry_run:
            return
        done.streams = gather_object([stream]) if stream else []
        main = self.accelerator.is_main_process
        weights, moments = collect(model, optimizer, keep=main)
        if main:
            state = {"done": asdict(done), "config": asdict(self.config), "data": self.data}
            checkpoints.save(self.folder, done.step, checkpoints.Saved(weights, moments, state))
            checkpoints.prune(self.folder, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        self.accelerator.wait_for_everyone()

    def find(self) -> Done:
        """How far the run is that is to go on; nothing is read but that, so that later steps can follow it."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            path, wrong = self._choose()
            found = [(path, wrong, None if wrong or path is None else checkpoints.state_of(Path(path)))]
        broadcast_object_list(found)
        self.path, wrong, state = found[0]
        if wrong:
            raise UserError(wrong)
        if self.path is None:
            return Done()
        self._visible(Path(self.path) / checkpoints.MANIFEST)
        self.state = state
        return Done(**state["done"])

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: str) -> None:
        """Go on from what was found; a run that begins leaves its configuration behind.

        data: the fingerprint of the data set.
        """
        self.data = data
        if self.path is None:
            if not self.config.dry_run:
                if self.accelerator.is_main_process:
                    self._begin()
                self.accelerator.wait_for_everyone()
                self._visible(self.output / "config.yaml")
            return
        self._check(self.state, self.path)
        saved = checkpoints.load(Path(self.path))
        restore(model, optimizer, saved.model, saved.optimizer)

    def _stays(self, name: str, now: Any) -> bool:
        """Whether a setting says now, or leaves to the run, what the run has chosen."""
        if name not in self.automatic:
            return False
        chosen = self.state["done"].get("chosen", {}).get(name.rpartition(".")[2])
        return now in ("auto", chosen) or (isinstance(now, bool) and now == bool(chosen))

    def _choose(self) -> tuple[str | None, str | None]:
        """The checkpoint to go on from, if any, or what is wrong."""
        asked = self.config.resume
        if asked == "never":
            return None, None
        if asked == "auto":
            path, skipped = checkpoints.newest(self.folder)
            for line in skipped:
                print(f"passed over {line}", flush=True)
            if skipped and path is None:
                return None, (
                    f"no checkpoint in {self.folder} is whole: start anew with --resume never, or restore one."
                )
            return (str(path) if path else None), None
        if not (Path(asked) / checkpoints.MANIFEST).is_file():
            return None, f"--resume {asked} is no checkpoint: give auto, never, or a folder …/checkpoints/step-…."
        wrong = checkpoints.fault(Path(asked))
        return asked, f"--resume {asked}: {wrong}. Take another checkpoint." if wrong else None

    def _begin(self) -> None:
        """Leave an earlier run in peace, and write down the settings of this one."""
        if self.folder.exists() or (self.output / "log.jsonl").exists():
            number = 1 + len(list(self.output.glob("earlier-*")))
            earlier = self.output / f"earlier-{number}"
            earlier.mkdir()
            for path in [p for p in self.output.iterdir() if not p.name.startswith("earlier-")]:
                path.rename(earlier / path.name)
            print(f"the run that was in {self.output} is now in {earlier}", flush=True)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(self.text)
        except OSError as error:
            raise UserError(f"output_dir={self.output} cannot be written ({error.strerror}): name another.") from error

    def _visible(self, path: Path) -> None:
        """Refuse a folder that some process does not see. All processes have to ask, and all end."""
        if not all(gather_object([path.is_file()])):
            raise UserError(
                f"output_dir={self.config.output_dir} has to be on a disk that all nodes share, and an absolute path "
                f"where they begin in other folders: some process does not see {path}."
            )

    def _check(self, state: dict[str, Any], path: str) -> None:
        """Refuse to go on with other settings or other images."""
        before, now = flat(state["config"]), flat(json.loads(json.dumps(asdict(self.config))))
        for name in sorted({*before, *now}):
            if name not in before and not name.startswith(self.free):
                raise UserError(
                    f"{path} was written by another version of this program, which had no {name}: go on with that one, "
                    "or start anew with --resume never."
                )
            same = before.get(name) == now.get(name) or self._stays(name, now.get(name))
            if not same and not name.startswith(self.free):
                raise UserError(
                    f"{name} was {before.get(name)} in {path} and is {now.get(name)} now: change it back, or start "
                    "anew with --resume never or another output_dir."
                )
        streams = state["done"]["streams"]
        if streams and len(streams) != self.accelerator.num_processes:
            raise UserError(
                f"a streamed data set goes on with the processes it began with: take {len(streams)}, or start anew "
                "with --resume never."
            )
        if state["data"] != self.data:
            raise UserError(
                f"data.path holds other images than when {path} was written: bring those "
                "back, or start anew with --resume never."
            )
