"""Booleans of a training step that the ranks agree on, and that are read without waiting for a GPU."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor


class StepFlags:
    """Booleans of a training step, each true where it is on any rank.

    On a GPU they are computed behind everything that it has to do before. So the host reads them a step later, when they are there: by a
    copy into pinned memory, and an event behind it.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, Any] | None = None

    def send(self, flags: Tensor, world_size: int) -> Tensor:
        """Combine the flags `[n]` (integers) with those of the other ranks. Returns them, on their device."""
        if world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._sent = self._start_copy(flags)
        return flags

    @property
    def is_late(self) -> bool:
        """Whether reading now would wait for the device."""
        return self._sent is not None and self._sent[1] is not None

    def read(self) -> list[bool]:
        """Return the flags that were sent last, and nothing where they were read already."""
        if self._sent is None:
            return []
        flags, event = self._sent
        if event is not None:
            event.synchronize()
        self._sent = None
        return [bool(flag) for flag in flags.tolist()]

    def _start_copy(self, flags: Tensor) -> tuple[Tensor, Any]:
        """Start the copy to the host. Returns it with the event of its end, or with None where it is there."""
        if not flags.is_cuda:
            return flags.cpu(), None
        on_host = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event
