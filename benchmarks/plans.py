"""Building and running training plans: ours against `torch.onnx.export`, and both against eager autograd.

    python benchmarks/plans.py --preset micro --sets norms,lora:8,full --export

CPU seconds of one process; steps are interleaved (eager, plan, eager, plan, ...), medians with minimum and maximum.
`--export` needs onnxscript.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F

from pocketfed.model.adapters import get_theta, layout_of, select
from pocketfed.model.config import STUDENTS
from pocketfed.model.heads import TextClassifier
from pocketfed.model.plans import Backbone, build_plans, verify_plans
from pocketfed.model.runtime import load_onnxruntime

LABELS, SEPARATOR = 7, 3


def open_session(path: Path) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batch_of(batch: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (batch, length), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(LABELS, (batch,), generator=generator),
    }


def exported_by_torch(model: TextClassifier, path: Path, feed: dict[str, torch.Tensor]) -> float:
    """CPU seconds to trace the same step with symbolic shapes and export it with torch.onnx."""
    from torch._decomp import core_aten_decompositions
    from torch.func import functional_call
    from torch.fx.experimental.proxy_tensor import make_fx

    layout = layout_of(model)
    names = {p.name for p in layout}
    frozen = {n: p.detach() for n, p in model.named_parameters() if n not in names}

    def step(
        theta: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, *values: torch.Tensor
    ) -> Any:
        leaves = {
            p.name: theta[p.offset : p.offset + p.size].view(p.shape).detach().requires_grad_(True) for p in layout
        }
        logits = functional_call(model, {**leaves, **dict(zip(frozen, values, strict=True))}, (ids, mask))
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return loss.detach(), (logits.argmax(-1) == labels).sum(), torch.cat([g.reshape(-1) for g in gradients])

    class Plan(torch.nn.Module):
        def __init__(self, graph: Any) -> None:
            super().__init__()
            self.graph = graph
            for i, value in enumerate(frozen.values()):
                self.register_buffer(f"frozen_{i}", value.clone())

        def forward(self, theta: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.graph(theta, ids, mask, labels, *[getattr(self, f"frozen_{i}") for i in range(len(frozen))])

    started = time.process_time()
    inputs = (torch.from_numpy(get_theta(model)), feed["input_ids"], feed["attention_mask"], feed["labels"])
    graph = make_fx(step, decomposition_table=core_aten_decompositions(), tracing_mode="symbolic")(
        *inputs, *frozen.values()
    )
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=3)
    shapes = ({}, {0: batch, 1: length}, {0: batch, 1: length}, {0: batch})
    program = torch.onnx.export(Plan(graph), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(path), external_data=True)
    return time.process_time() - started


def measure(
    preset: str, trainable_set: str, batch: int, length: int, repeats: int, export: bool, layers: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    config = STUDENTS[preset]
    model = select(
        TextClassifier(config.with_changes(num_hidden_layers=layers or config.num_hidden_layers), LABELS, SEPARATOR),
        trainable_set,
    )
    feed = batch_of(batch, length, config.vocab_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    row: dict[str, Any] = {
        "preset": preset,
        "layers": layers or config.num_hidden_layers,
        "set": trainable_set,
        "batch": batch,
        "length": length,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.process_time()
        backbone = Backbone(quantized=True)
        plans = build_plans(model, trainable_set, backbone)
        row["build_cpu_s"] = round(time.process_time() - started, 2)
        (folder / "backbone.bin").write_bytes(backbone.data)
        files = {name: f"{name}.onnx" for name in plans.files}
        for name, plan in plans.files.items():
            (folder / files[name]).write_bytes(plan)
        row["nodes"] = len(onnx.load(folder / "train.onnx", load_external_data=False).graph.node)
        row["largest_difference_from_autograd"] = float(f"{verify_plans(model, plans, folder, files, backbone):.2g}")
        row["backbone_mb"] = round(len(backbone.data) / 1e6, 2)
        ours = open_session(folder / "train.onnx")
        arrays = {k: v.numpy() for k, v in feed.items()}
        runs = {
            "eager": lambda: torch.autograd.grad(
                F.cross_entropy(model(feed["input_ids"], feed["attention_mask"]), feed["labels"]), trained
            ),
            "plan": lambda: ours.run(None, {"theta": plans.theta, **arrays}),
        }
        if export:
            row["torch_export_cpu_s"] = round(exported_by_torch(model, folder / "torch.onnx", feed), 2)
            theirs = open_session(folder / "torch.onnx")
            named = [i.name for i in theirs.get_inputs()]
            values = dict(
                zip(named, [plans.theta, arrays["input_ids"], arrays["attention_mask"], arrays["labels"]], strict=True)
            )
            runs["torch_export"] = lambda: theirs.run(None, values)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(repeats + 2):
            for name, run in runs.items():
                started = time.process_time()
                run()
                if i >= 2:
                    times[name].append(1000 * (time.process_time() - started))
    for name, values_ms in times.items():
        row[f"{name}_ms"] = [round(f(values_ms), 2) for f in (statistics.median, min, max)]
    row["eager_over_plan"] = round(statistics.median(np.array(times["eager"]) / np.array(times["plan"])), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--sets", default="norms,lora:8,full")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=0, help="instead of the preset's")
    parser.add_argument("--export", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets.split(","):
        row = measure(
            arguments.preset,
            name,
            arguments.batch,
            arguments.length,
            arguments.repeats,
            arguments.export,
            arguments.layers,
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
