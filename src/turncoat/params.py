"""A module as one flat vector, and n vectors as the rows of one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of a module lies in the vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    dtype: torch.dtype
    trainable: bool

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The slots of a module: parameters first, then buffers.

    Integer buffers travel as float32, exact up to 2**24.
    """

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        named: list[tuple[str, Tensor, bool]]
        named = [(n, t, True) for n, t in module.named_parameters()]
        named += [(n, t, False) for n, t in module.named_buffers() if n in module.state_dict()]
        slots, start = [], 0
        for name, tensor, trainable in named:
            slots.append(Slot(name, tuple(tensor.shape), start, tensor.dtype, trainable))
            start = slots[-1].stop
        return cls(tuple(slots))

    @property
    def num_params(self) -> int:
        return self.slots[-1].stop if self.slots else 0

    @property
    def num_trainable(self) -> int:
        return max((s.stop for s in self.slots if s.trainable), default=0)

    def flatten(self, module: nn.Module) -> Tensor:
        """Return a copy of the module's state. Shape: ``(num_params,)``."""
        state = module.state_dict()
        return torch.cat([state[s.name].detach().reshape(-1).float() for s in self.slots])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the named tensors: differentiable views; buffers are copies, free to be edited."""
        views = {}
        for s in self.slots:
            view = vector[s.start : s.stop].reshape(s.shape)
            views[s.name] = view if s.trainable else _cast(view.detach().clone(), s.dtype)
        return views


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another type: what is no whole number is rounded, if it must be one."""
    return tensor.to(dtype) if dtype.is_floating_point else tensor.round().to(dtype)


def stack(rows: Sequence[Tensor]) -> Tensor:
    """Return the matrix with these rows; no copy if they already are consecutive rows of one."""
    found = matrix_of(rows)
    return torch.stack(list(rows)) if found is None else found


def matrix_of(rows: Sequence[Tensor]) -> Tensor | None:
    """Return the matrix of which these are consecutive rows, without a copy; None if of none."""
    first = rows[0]
    size = first.numel()
    base = first.untyped_storage().data_ptr()
    if first.requires_grad or not all(
        r.untyped_storage().data_ptr() == base
        and r.is_contiguous()
        and r.storage_offset() == first.storage_offset() + i * size
        for i, r in enumerate(rows)
    ):
        return None
    return first.as_strided((len(rows), size), (size, 1), first.storage_offset())
