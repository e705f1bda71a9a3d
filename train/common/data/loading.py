"""A DataLoader's batches, by workers that leave signals to the main process, and that nobody waits for in vain.

A worker that reads from a disk that has gone (a lost mount) never comes back; the main process would hold its GPUs.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from timm_dseq import UserError

from ..system.signals import end_workers, ignore_signals, seconds_since_asked

LOOK = 5.0  # seconds of waiting after which the main process looks whether it still makes sense
PATIENCE = 600.0  # seconds without a batch that end a run
WHEN_ASKED = 15.0  # the same, since a signal has asked it to stop: schedulers kill after 30 seconds


def loaded(samples: Dataset, **options: Any) -> Iterator[Any]:
    """The batches of a DataLoader with these options."""
    workers = options.get("num_workers", 0)
    options |= {"worker_init_fn": ignore_signals, "timeout": LOOK if workers else 0}
    batches, waited = iter(DataLoader(samples, **options)), 0.0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            waited += LOOK
            if waited < PATIENCE and min(waited, seconds_since_asked()) < WHEN_ASKED:
                continue
            end_workers()  # or the loader would wait five seconds for each of them
            raise UserError(
                f"no image has arrived for {waited:.0f} s, so the run ends: is the disk of data.path still there? "
                "The same command goes on from the newest checkpoint."
            ) from error
        waited = 0.0
        yield batch
