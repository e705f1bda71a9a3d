"""The run of a dense task: a supervised run whose model has a DenseBackbone in it."""

from accelerate import Accelerator

from ..run.length import Length
from ..supervised.run import SupervisedRun, Task
from ..supervised.settings import FREE, Settings
from ..supervised.step import Training
from .backbone import backbone_of
from .layer_decay import layer_groups


def dense_run(
    task: Task, config: Settings, text: str, accelerator: Accelerator, free: tuple[str, ...] = ()
) -> SupervisedRun:
    """Everything that is quick to check is checked here.

    text: the settings as YAML. free: settings of this task that may differ when it is resumed.
    """
    length = Length.of(config.optim, len(task.images), accelerator.num_processes)
    backbone_of(task.model).checkpointing = config.system.checkpointing
    training = Training(task.model, layer_groups(task.model, config.optim), task.loss, config, accelerator)
    return SupervisedRun(task, training, length, config, text, accelerator, FREE + free)
