"""One training step in ExecuTorch, ONNX Runtime and eager torch: CPU time on one core, memory, and what lowering costs.

    python benchmarks/executorch_step.py --preset micro --train lora:8 --batch 4 --length 64

Each engine runs in processes of its own, in turns. ExecuTorch's Python runtime loads torch; its runtimes on a phone do not,
so beside the peak memory stands what it grew by from after the imports to after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("executorch", "onnxruntime", "eager")
INPUTS = ("theta", "input_ids", "attention_mask", "labels")
PTE, ONNX, BATCH = "step.pte", "train.onnx", "batch.safetensors"


def memory_mb() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def model_of(arguments: argparse.Namespace) -> Any:
    import torch

    from pocketfed.model.adapters import select
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.heads import TextClassifier

    torch.manual_seed(0)
    return select(TextClassifier(STUDENTS[arguments.preset], 4, 3), arguments.train).eval()


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both files, and a batch."""
    import torch
    from safetensors.torch import save_file

    from pocketfed.model.executorch_export import export_executorch
    from pocketfed.model.plans import BACKBONE_FILE, Backbone, build_plans

    model = model_of(arguments)
    backbone = Backbone(quantized=True)
    plans = build_plans(model, arguments.train, backbone)
    (folder / ONNX).write_bytes(plans.files["train"])
    (folder / BACKBONE_FILE).write_bytes(backbone.data)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (arguments.batch, arguments.length), generator=generator)
    labels = torch.randint(4, (arguments.batch,), generator=generator)
    values = (torch.from_numpy(plans.theta), ids, torch.ones_like(ids), labels)
    save_file(dict(zip(INPUTS, values, strict=True)), folder / BATCH)
    began, wall = time.process_time(), time.perf_counter()
    made = export_executorch(
        model, folder / PTE, batch=arguments.batch, length=arguments.length, quantized=not arguments.fp32
    )
    return {
        "lowering_cpu_s": round(time.process_time() - began, 1),
        "lowering_wall_s": round(time.perf_counter() - wall, 1),
        "lowering_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "pte_bytes": made.bytes,
        "onnx_bytes": len(plans.files["train"]) + len(backbone.data),
        "delegates": made.delegates,
        "parameters": made.parameters,
        "error": made.error,
    }


def step_of(engine: str, arguments: argparse.Namespace, folder: Path) -> Callable[[], Any]:
    from safetensors.numpy import load_file

    from pocketfed.model.runtime import load_onnxruntime

    batch = load_file(folder / BATCH)
    if engine == "onnxruntime":
        onnxruntime = load_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(folder / ONNX), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, batch)
    import torch

    torch.set_num_threads(1)
    inputs = tuple(torch.from_numpy(batch[name]) for name in INPUTS)
    if engine == "executorch":
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(folder / PTE)
        train = program.load_method("train")
        return lambda: train.execute(inputs)
    model = model_of(arguments)
    trained = [p for p in model.parameters() if p.requires_grad]
    _, ids, mask, labels = inputs
    return lambda: torch.autograd.grad(torch.nn.functional.cross_entropy(model(ids, mask), labels), trained)


def measure(engine: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    if engine == "onnxruntime":
        from pocketfed.model.runtime import load_onnxruntime

        load_onnxruntime()
    else:
        import torch  # noqa: F401
    if engine == "executorch":
        import executorch.runtime  # noqa: F401
    imported = memory_mb()
    step = step_of(engine, arguments, folder)
    for _ in range(2):
        step()
    times = []
    for _ in range(arguments.steps):
        began = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"ms": statistics.median(times), "peak_mb": peak, "growth_mb": peak - imported}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--train", default="lora:8")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fp32", action="store_true", help="float weights in the .pte")
    parser.add_argument("--folder", type=Path, help="keep the files here; what is there already is used again")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.engine, arguments, arguments.folder)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # XNNPACK takes a thread a core
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        arguments.folder = arguments.folder or Path(scratch)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if not (arguments.folder / PTE).exists():
            print(json.dumps(prepare(arguments, arguments.folder)), flush=True)
        results: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(arguments.rounds):
            for engine in ENGINES:
                again = [sys.executable, __file__, *sys.argv[1:], "--folder", str(arguments.folder), "--engine", engine]
                done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
                results[engine].append(json.loads(done.stdout.splitlines()[-1]))
    for engine, runs in results.items():
        times = sorted(run["ms"] for run in runs)
        memory = max(run["peak_mb"] for run in runs), max(run["growth_mb"] for run in runs)
        print(
            f"{engine:12} {statistics.median(times):8.1f} ms CPU a step ({times[0]:.1f} to {times[-1]:.1f}); "
            f"peak {memory[0]:.0f} MB, {memory[1]:.0f} of them after the imports"
        )


if __name__ == "__main__":
    main()
