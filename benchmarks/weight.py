"""What the SDK weighs: on disk, to import, and until its first prediction, beside a stock Flower client in the same run.

    python benchmarks/weight.py --repeats 15 --install

`--install` also puts this checkout into a fresh virtual environment (it takes a package index and half a minute) and lists
its packages by size. Processes are fresh and take turns; CPU seconds of the process, memory at the end, medians and spread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import interleaved, ratio, spread, table

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {"cpu_s": "CPU s", "rss_mb": "RSS MB", "peak_mb": "peak MB", "modules": "modules"}
OF_THE_ENVIRONMENT = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")
# What each process does; a Flower client's own code needs flwr and, as its quickstarts have it, torch.
VARIANTS = {
    "python": "pass",
    "import pocketfed.client_sdk": "import pocketfed.client_sdk",
    "from pocketfed.client_sdk import Device": "from pocketfed.client_sdk import Device",
    "and ONNX Runtime": "from pocketfed.client_sdk import Device, plan_trainer; plan_trainer.load_onnxruntime()",
    "from flwr.clientapp import ClientApp": "from flwr.clientapp import ClientApp",
    "and torch": "from flwr.clientapp import ClientApp; import torch",
}
PREDICTION = "first prediction, from an artifact on disk"
MEASURED = """
import json, resource, sys, time
began = time.process_time()
{code}
usage = time.process_time() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({{"cpu_s": usage, "rss_mb": int(status["VmRSS"].split()[0]) * 1024 / 1e6,
                  "peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6, "modules": len(sys.modules)}}))
"""
PREDICT = """
from pathlib import Path
from pocketfed.client_sdk.artifacts import open_artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import pad
trainer = PlanTrainer(open_artifact(Path({folder!r})), {trainable_set!r})
assert trainer.logits(trainer.initial_theta(), *pad(trainer.encode(["put on a record"], [None]))).shape[0] == 1
"""


def build(preset: str, folder: Path) -> tuple[str, str]:
    """An untrained int8 student's artifact."""
    from pocketfed.coordinator.artifacts import build_artifact
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(["put on a record", "wake me at seven", "turn on the light"], 200)
    built = build_artifact(
        folder, config=STUDENTS[preset].with_changes(vocab_size=len(vocabulary)), state={}, vocabulary=vocabulary,
        labels=("play_music", "set_alarm"), trainable_sets=("lora:8",), quantized=True, max_length=64, preset=preset, seed=0,
    )  # fmt: skip
    return str(built.folder), "lora:8"


def installed(folder: Path) -> dict[str, float]:
    """MB of 10^6 bytes on disk, a package each, after `pip install .` in a fresh virtual environment."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-warn-script-location", ROOT], check=True
    )
    site = next(venv.glob("lib/python3*/site-packages"))
    sizes = {
        entry.name: sum(p.lstat().st_blocks * 512 for p in [entry, *entry.rglob("*")]) / 1e6
        for entry in site.iterdir()
        if not entry.name.startswith(OF_THE_ENVIRONMENT)
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        predict = PREDICT.format(
            **dict(zip(("folder", "trainable_set"), build(arguments.preset, Path(scratch) / "a"), strict=True))
        )
        codes = VARIANTS | {PREDICTION: predict}
        commands = {name: [sys.executable, "-c", MEASURED.format(code=code)] for name, code in codes.items()}
        results = interleaved(commands, arguments.repeats)
        sizes = installed(Path(scratch)) if arguments.install else {}
    print(table(results, COLUMNS))
    ours, theirs = results["and ONNX Runtime"], results["and torch"]
    for key in ("cpu_s", "rss_mb"):
        print(
            "flwr and torch / Device and ONNX Runtime, {}: {:.1f} [{:.1f}, {:.1f}]".format(
                key, *ratio(ours, theirs, key)
            )
        )
    if sizes:
        print(f"\ninstalled: {sum(sizes.values()):.1f} MB")
        print("\n".join(f"{mb:8.1f}  {name}" for name, mb in sizes.items() if mb >= 0.1))
    if arguments.json:
        medians = {name: {key: spread(rows, key) for key in COLUMNS} for name, rows in results.items()}
        arguments.json.write_text(json.dumps({"processes": medians, "installed_mb": sizes}, indent=2) + "\n")


if __name__ == "__main__":
    main()
