"""The fused student as an ExecuTorch program for XNNPACK: `predict(input_ids, attention_mask) -> logits`, of one batch and length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketfed.model.executorch_export import pad_or_crop, quietly
from pocketfed.model.fusing import FusedStudent

METHOD = "predict"


def write_program(student: FusedStudent, place: Path, batch: int, length: int) -> None:
    example = (torch.ones(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.int64))
    with quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        exported = torch.export.export(student, example)
        exported = exported.run_decompositions({torch.ops.aten.pad.default: _pad})
        program = to_edge_transform_and_lower(
            {METHOD: exported},
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        ).to_executorch()
    place.write_bytes(bytes(program.buffer))


def _pad(x: Tensor, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    return pad_or_crop(x, widths, value or 0.0)


def load_program(path: Path, name: str) -> Any:
    """A method of a program, in ExecuTorch's Python runtime."""
    with quietly():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(path).load_method(name)
