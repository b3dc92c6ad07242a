"""How long a prediction takes: BERT_BASE, Hugging Face's MobileBERT, ours in every engine and scheme, and the ceiling of the machine.

    python benchmarks/inference.py --out rows.jsonl                # everything; goes on where it was stopped
    python benchmarks/inference.py --out rows.jsonl --quick        # sequence 128, batch 1, one thread, what the goals compare
    python benchmarks/inference.py --out rows.jsonl --only table   # the tables of what is in the file already

Random weights of the published geometry; OpenVINO compiles for the one shape. All models of one setting are open in one
process and run in turn, A B C, A B C, ...; a time is CPU time of the process on one thread, wall time on more; medians with
smallest and largest; a ratio is taken turn by turn. Cold start, memory and file size are of a fresh process each. Needs
transformers, openvino, and `--executorch` executorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import peak_rss_mb, run_once
from inference_variants import (
    OPERATIONS,
    OPTIONAL,
    PRESETS,
    QUICK,
    VARIANTS,
    config_of,
    flops_name,
    longest_of,
    make,
    open_variant,
    place_of,
)

from pocketfed.model.mobilebert import count_flops, count_parameters
from pocketfed.model.rows import append_row, whole_rows

SETTINGS = [(threads, length, batch) for threads in (1, 2) for length in (128, 32) for batch in (1, 8)]
MAIN = SETTINGS[0]
TARGET_S = 0.15  # of one model, in one turn
GOALS = (  # what is to be how many times as fast as what, at least
    ("hf-bert-base/onnx/float32", "mobilebert/onnx/float32", 4.1),
    ("hf-bert-base/openvino/float32", "mobilebert/openvino/float32", 4.1),
    ("hf-bert-base/onnx/float32", "mobilebert-tiny/onnx/float32", 5.5),
    ("hf-bert-base/onnx/float32", "mobilebert/onnx/int8-dynamic", 12.0),
    ("hf-bert-base/onnx/float32", "mobilebert/openvino/int8-static", 12.0),
    ("hf-bert-base/openvino/float32", "mobilebert/openvino/int8-static", 12.0),
    ("hf-bert-base/onnx/int8-usual", "mobilebert/onnx/int8-dynamic", 3.5),
    ("bert-base/openvino/int8-static", "mobilebert/openvino/int8-static", 3.5),
    ("hf-mobilebert/onnx/int8-usual", "mobilebert/onnx/int8-dynamic", 1.3),
    ("hf-mobilebert/onnx/int8-usual", "mobilebert/openvino/int8-static", 1.3),
)


# ---- measuring -----------------------------------------------------------------------------------------------------


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds a call, a number a turn."""
    clock = time.process_time if threads == 1 else time.perf_counter
    counts = {}
    for name, run in runs.items():
        run()
        started = clock()
        run()
        counts[name] = max(1, min(200, round(TARGET_S / max(1e-6, clock() - started))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = clock()
            for _ in range(counts[name]):
                run()
            times[name].append(round(1000 * (clock() - started) / counts[name], 4))
    return times


def texts(batch: int, length: int) -> tuple[Any, Any]:
    ids = np.random.default_rng(0).integers(5, 2000, (batch, length), dtype=np.int64)
    return ids, np.ones_like(ids)


def time_setting(variants: Iterable[str], setting: tuple[int, int, int], repeats: int, work: Path) -> dict[str, Any]:
    threads, length, batch = setting
    torch.set_num_threads(threads)
    ids, mask = texts(batch, length)
    runs: dict[str, Callable[[], Any]] = {}
    for variant in variants:
        if longest_of(variant) >= length and ("executorch" not in variant or setting == MAIN):
            predict = open_variant(variant, work, threads, (batch, length))
            runs[variant] = lambda predict=predict: predict(ids, mask)
    return {"threads": threads, "length": length, "batch": batch, "ms": in_turn(runs, repeats, threads)}


def cold(variant: str, work: Path) -> dict[str, Any]:
    """In a fresh process: imports done, from opening the file to the first logits."""
    before = peak_rss_mb()
    started = time.perf_counter()
    open_variant(variant, work, 1)(*texts(1, min(128, longest_of(variant))))
    seconds = time.perf_counter() - started
    place = place_of(variant, work)
    files = [p for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    return {
        "cold_s": round(seconds, 3),
        "rss_mb": round(peak_rss_mb(), 1),
        "import_mb": round(before, 1),
        "bytes": size,
    }


def ceilings() -> dict[str, Any]:
    """GFLOP/s of large products in float32 and int8, the best of several, and GB/s of reading memory; one thread, CPU time."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.matmul.fp32_precision = (
        "bf16"  # leaves MKL, which is slow on AMD; float32 on CPUs without AMX
    )
    size = 1536
    a, b = torch.randn(size, size), torch.randn(size, size)
    a8, b8 = (torch.randint(-127, 127, (size, size), dtype=torch.int8) for _ in range(2))
    held = np.ones(1 << 27, np.float32)
    operations = 2 * size**3 / 1e6
    times = in_turn(
        {"float32": lambda: a @ b, "int8": lambda: torch._int_mm(a8, b8), "memory": lambda: held.sum()}, 7, 1
    )
    return {
        "float32_gflops": round(operations / min(times["float32"])),
        "int8_gops": round(operations / min(times["int8"])),
        "memory_gb_s": round(held.nbytes / 1e6 / min(times["memory"]), 1),
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def middle(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    return [s / f for s, f in zip(slow, fast, strict=True)]


def tables(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in (r for r in rows if "ms" in r and r["kind"] == "times"):
        lines += [f"\n{row['threads']} thread(s), sequence {row['length']}, batch {row['batch']}, ms", ""]
        base = row["ms"].get("hf-bert-base/onnx/float32")
        lines += ["| model / engine / scheme | ms | x faster than BERT_BASE, ONNX Runtime float32 |", "|---|---|---|"]
        for name, values in row["ms"].items():
            faster = middle(ratios(base, values)) if base else ""
            lines.append(f"| {name} | {middle(values)} | {faster} |")
        if (row["threads"], row["length"], row["batch"]) == MAIN:
            lines += goals(row["ms"])
            lines += roofline(row, next((r for r in rows if r["kind"] == "ceilings"), None))
    for row in (r for r in rows if r["kind"] == "operations"):
        lines += [
            "\nOperational optimisations, sequence 128, batch 1, one thread, ms",
            "",
            "| | eager | ONNX Runtime |",
            "|---|---|---|",
        ]
        for name in dict.fromkeys(v.split("/")[0] for v in row["ms"]):
            lines.append(
                f"| {name} | {middle(row['ms'][f'{name}/eager'])} | {middle(row['ms'][f'{name}/onnx/float32'])} |"
            )
    lines += [
        "\nA fresh process",
        "",
        "| | load to first prediction, s | peak memory, MB (imports alone) | file, MB |",
        "|---|---|---|---|",
    ]
    for row in (r for r in rows if r["kind"] == "cold"):
        size = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else ""
        lines.append(
            f"| {row['variant']} | {row['cold_s']:.2f} | {row['rss_mb']:.0f} ({row['import_mb']:.0f}) | {size} |"
        )
    return "\n".join(lines)


def goals(times: dict[str, list[float]]) -> list[str]:
    lines = ["", "| goal | at least | reached |", "|---|---|---|"]
    for slow, fast, least in GOALS:
        if slow in times and fast in times:
            lines.append(f"| {fast} over {slow} | {least} | {middle(ratios(times[slow], times[fast]))} |")
    return lines


def roofline(row: dict[str, Any], most: dict[str, Any] | None) -> list[str]:
    """The least time that products and weights allow, and how many times as long it took."""
    if most is None:
        return []
    lines = ["", f"Measured in the same run: float32 {most['float32_gflops']} GFLOP/s, int8 {most['int8_gops']} GOP/s, memory "
             f"{most['memory_gb_s']} GB/s", "", "| | GFLOP | products alone, ms | weights read once, ms | took, times the longer |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, values in row["ms"].items():
        config = config_of(flops_name(name))
        flops = count_flops(config, row["length"]) * row["batch"]
        whole = "int8" in name
        compute = flops / 1e6 / most["int8_gops" if whole else "float32_gflops"]
        # A token's row of the table is read, not the table.
        weights = count_parameters(config) - config.vocab_size * config.embedding_size
        read = weights * (1 if whole else 4) / 1e6 / most["memory_gb_s"]
        times = statistics.median(values) / max(compute, read)
        lines.append(f"| {name} | {flops / 1e9:.2f} | {compute:.2f} | {read:.2f} | {times:.2f} |")
    return lines


# ---- the command ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="rows of JSON; what is there is not measured again")
    parser.add_argument("--work", type=Path, help="folder for the models, by default beside --out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--executorch", action="store_true")
    parser.add_argument("--only", choices=("times", "operations", "cold", "ceilings", "table"))
    parser.add_argument("--process", help=argparse.SUPPRESS)  # one measurement, printed as a line of JSON
    given = parser.parse_args()
    work = given.work or given.out.with_suffix(".models")
    if given.process:
        print(json.dumps(_measure(json.loads(given.process), work, given.repeats)))
        return
    work.mkdir(parents=True, exist_ok=True)
    variants = QUICK if given.quick else (*VARIANTS, *(OPTIONAL if given.executorch else ()))
    jobs: list[dict[str, Any]] = [{"kind": "ceilings"}]
    jobs += [{"kind": "times", "setting": s, "variants": variants} for s in ([MAIN] if given.quick else SETTINGS)]
    jobs += [] if given.quick else [{"kind": "operations", "setting": MAIN, "variants": OPERATIONS}]
    jobs += [{"kind": "cold", "variant": v} for v in variants if v not in PRESETS[:-2]]
    for job in jobs:
        if given.only in (None, job["kind"]) and json.loads(json.dumps(job)) not in [
            r["job"] for r in whole_rows(given.out)
        ]:
            for variant in job.get("variants", [job["variant"]] if "variant" in job else []):
                make(variant, work)
            command = [sys.executable, __file__, "--out", str(given.out), "--work", str(work)]
            row = run_once(
                [*command, "--repeats", str(given.repeats), "--process", json.dumps(job)], job.get("setting", MAIN)[0]
            )
            append_row(given.out, {"kind": job["kind"], "job": job, "commit": _commit(), **row})
            print(f"{job['kind']} {job.get('variant', job.get('setting', ''))}", file=sys.stderr, flush=True)
    print(tables(whole_rows(given.out)))


def _measure(job: dict[str, Any], work: Path, repeats: int) -> dict[str, Any]:
    if job["kind"] == "ceilings":
        return ceilings()
    if job["kind"] == "cold":
        return {"variant": job["variant"], **cold(job["variant"], work)}
    return time_setting(job["variants"], tuple(job["setting"]), repeats, work)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
