"""A pretended GPU, on a machine without one, that notes each time the host would wait for it.

Tensors that are put on it, and all that is computed from them, report the device "cuda" and compute on the CPU. Noted
is whatever brings their numbers to the host: a copy, a number, a truth value, a size that depends on them; and whatever
the host sends from memory that is not pinned.
"""

import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# functions whose result tells the host something about the numbers in a tensor
READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "__array__", "equal", "nonzero")
READS += (
    "allclose",
    "unique",
    "masked_select",
    "__contains__",
    "argwhere",
    "bincount",
    "is_nonzero",
    "repeat_interleave",
)
PLAIN = (
    "__get__",
    "size",
    "dim",
    "__len__",
    "stride",
    "numel",
    "data_ptr",
    "is_floating_point",
    "is_complex",
    "__hash__",
)

ROOT = Path(__file__).parents[1]
OURS = (str(ROOT / "timm_dseq"), str(ROOT / "train" / "common"))  # the folder of all of it may have any name


class FarDevice(TorchFunctionMode):
    """`crossings`: copies to the host, one line each. `waits`: copies to the device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.pinned = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.crossings: list[str] = []
        self.waits: list[str] = []

    def put(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.far[tensor] = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [x for x in _leaves([args, kwargs]) if isinstance(x, torch.Tensor)]
        far = [x for x in tensors if x in self.far]
        if func == torch.Tensor.device.__get__:
            return CUDA if far else CPU
        if func == torch.Tensor.is_cuda.__get__:
            return bool(far)
        if name == "pin_memory":
            pinned = args[0].clone()
            self.pinned[pinned] = True
            return pinned
        kwargs.pop("pin_memory", None)
        where, args, kwargs = _device_of(args, kwargs)
        if name == "cpu":
            where = CPU
        out = func(*args, **kwargs)
        if name in ("to", "cpu") and where is not None and where.type == "cpu" and far:
            self.crossings.append(self._line(name))
            return out.clone() if any(out is x for x in tensors) else out
        sent = where is not None and where.type == "cuda" and name in ("to", "tensor", "as_tensor", "asarray")
        index = _leaves([args[1]]) if far and name in ("__getitem__", "__setitem__") else []
        if (sent and not far and not any(x in self.pinned for x in tensors)) or any(
            isinstance(x, torch.Tensor) and x not in self.far for x in index
        ):
            self.waits.append(self._line(name))
        if name == "copy_" and args[0] not in self.far and args[1] in self.far:
            self.crossings.append(self._line(name))
            return out
        if far and (name in READS or _by_mask(name, args)):
            self.crossings.append(self._line(name))
        if name in PLAIN or not (far or (where is not None and where.type == "cuda")):
            return out
        if name == "to" and out is args[0]:
            out = out.view_as(out)
        self.put(*(x for x in _leaves([out]) if isinstance(x, torch.Tensor)))
        return out

    def _line(self, name: str) -> str:
        ours = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
        return f"{name} in {ours[-1].name}: {ours[-1].line}" if ours else name


class Event:
    """torch.cuda.Event, where there is none."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def _leaves(tree) -> list:
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in _leaves(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _leaves(part)]
    return [tree]


def _device_of(args, kwargs):
    """The device a call names, and the call without it."""
    where = None
    if isinstance(kwargs.get("device"), (str, torch.device)):
        where, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": CPU}
    elif any(isinstance(x, torch.device) for x in args):
        where = next(x for x in args if isinstance(x, torch.device))
        args = tuple(CPU if isinstance(x, torch.device) else x for x in args)
    return where, args, kwargs


def _by_mask(name: str, args) -> bool:
    """x[mask], whose size depends on the mask."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in _leaves([args[1]]))
