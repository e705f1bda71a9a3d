"""Copies between host and device: small tables go to the device, and once a step a few numbers come back."""

import torch


def to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host table on the device, copied from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and table.device.type == "cpu":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


class Fetch:
    """Tensors of one device, copied to the host together: the copy starts at once, `read` waits for its end.

    In between the device works on whatever it is given.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._like = [(t.shape, t.dtype) for t in tensors]
        bits = torch.cat([_to_bits(t).flatten() for t in tensors])
        self._copied = None
        if bits.device.type == "cuda":
            self._host = torch.empty(bits.shape, dtype=bits.dtype, pin_memory=True).copy_(bits, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = bits.cpu()

    def read(self) -> list[torch.Tensor]:
        """The tensors on the host, in their order, shapes and types."""
        if self._copied is not None:
            self._copied.synchronize()
        parts = self._host.split([shape.numel() for shape, _ in self._like])
        return [_from_bits(part, dtype).view(shape) for part, (shape, dtype) in zip(parts, self._like, strict=True)]


def _to_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of any type as int64, so that one copy takes them all."""
    if tensor.dtype == torch.float64:
        return tensor.view(torch.int64)
    if tensor.dtype == torch.float32:
        return tensor.view(torch.int32).long()
    return tensor.long()


def _from_bits(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `_to_bits`."""
    if dtype == torch.float64:
        return bits.view(torch.float64)
    if dtype == torch.float32:
        return bits.int().view(torch.float32)
    return bits.to(dtype)
