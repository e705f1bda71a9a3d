"""The run of one seed: a supervised run of a classifier, with layer decay and, if wanted, a moving average."""

import math

from accelerate import Accelerator
from timm.optim import param_groups_layer_decay
from torch.nn.modules.batchnorm import _BatchNorm

from ..labels.labelled import Labelled
from ..run.length import Length
from ..supervised.run import SupervisedRun
from ..supervised.step import Training
from ..system import machine
from .settings import FREE, Tuning
from .task import Classification


def seed_run(
    config: Tuning, text: str, labelled: Labelled, accelerator: Accelerator
) -> tuple[Classification, SupervisedRun]:
    """Of the one seed that `config` names. Everything that is quick to check is checked here.

    text: the settings as YAML.
    """
    mixing = bool(config.augment.mixup or config.augment.cutmix)
    length = Length.of(config.optim, len(labelled.train), accelerator.num_processes, pairs=mixing)
    task = Classification(config, labelled, accelerator)
    model, optim = task.model, config.optim
    if config.system.checkpointing:
        model.set_grad_checkpointing()
    not_decayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, optim.weight_decay, not_decayed, layer_decay=optim.layer_decay)
    training = Training(model, groups, task.loss, config, accelerator, task.ema, task.saved)
    normed = any(isinstance(part, _BatchNorm) for part in model.modules())  # together, the images of a round
    free = tuple(name for name in FREE if not (normed and name == "optim.accumulation"))
    batch = length.micro_batch * 4 * math.prod(task.preprocessing["input_size"])  # bytes
    remark = machine.short_of_memory(config.workers, batch)
    return task, SupervisedRun(task, training, length, config, text, accelerator, free, remark)
