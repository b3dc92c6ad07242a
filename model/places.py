"""Where a training runs: on one device, alone or as one process of several that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pocketfed.model.schedules import DistillationError

T = TypeVar("T")
DEVICES = ("cpu", "cuda")
WAITS = datetime.timedelta(days=2)  # while the first process encodes a large corpus; torchrun ends all if one dies


@dataclass(frozen=True)
class Place:
    """Where training runs: one process of `ranks` (torchrun), on one device."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    ranks: int = 1

    @classmethod
    def here(cls, device: str = "cpu") -> Place:
        """Reads torchrun's variables and joins its group; `leave` it at the end.

        Raises:
            DistillationError: a device that is not there, or of a kind that is not known.
        """
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if device not in DEVICES:
            raise DistillationError(f"the device {device!r} is not known; choose one of {', '.join(DEVICES)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise DistillationError("there is no CUDA device here; leave --device out to train on the CPU")
        where, at = torch.device(device), int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            if at >= torch.cuda.device_count():
                raise DistillationError(
                    f"process {at} of this machine has no CUDA device, there are {torch.cuda.device_count()}; start as many "
                    "processes with --nproc-per-node"
                )
            where = torch.device(device, at)
            torch.cuda.set_device(where)
        if ranks > 1 and not dist.is_initialized():
            if device == "cuda":
                dist.init_process_group("nccl", timeout=WAITS, device_id=where)
            else:
                dist.init_process_group("gloo", timeout=WAITS)
        return cls(where, rank, ranks)

    def leave(self) -> None:
        """The group of processes, if there is one."""
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def in_turn(self, work: Callable[[], T]) -> T:
        """The first process works alone, the others after it: what it leaves on disk is there for them."""
        if self.ranks > 1 and not self.first:
            dist.barrier()
        done = work()
        if self.ranks > 1 and self.first:
            dist.barrier()
        return done

    def add_up(self, values: Tensor) -> None:
        """Sums over the processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
