"""The same run twice: `pocketfed serve` with `pocketfed device` processes over loopback gRPC, and in this process.

    python benchmarks/processes.py --data DATA --devices 4 --rounds 3 --model micro --partition dirichlet:0.3

Prints both results' SHA-256 and seconds a round; ends with 1 if they differ in a bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pocketfed.cli.demo import lines_of, process, wait_for
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import publish_artifact, read_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.store import Store, device_named
from pocketfed.model.tasks import read_dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.partition import partition
from pocketfed.simulations.run import device_names, encode_examples, prepare_artifact


def as_processes(folder: Path, config: RunConfig, names: list[str]) -> tuple[str, list[float]]:
    """SHA-256 of the final parameters, and seconds of each round."""
    local = "\n".join(f"{k} = {json.dumps(v)}" for k, v in vars(config.local).items())
    (folder / "run.toml").write_text(
        f"rounds = {config.rounds}\nmin_devices = {len(names)}\nseed = {config.seed}\n[local]\n{local}\n"
    )
    serve = [
        "serve",
        "--database",
        str(folder / "processes.db"),
        "--listen",
        "127.0.0.1:0",
        "--run",
        str(folder / "run.toml"),
    ]
    serve += ["--exit-when-done", "--json", str(folder / "processes.json")]
    with process(folder / "serve.log", *serve, read=True) as coordinator, ExitStack() as members:
        address = wait_for(coordinator, "listening on ", folder / "serve.log").removeprefix("listening on ")
        for name in names:
            arguments = ["--data", str(folder / f"{name}.jsonl"), "--home", str(folder / name), "--name", name]
            arguments += ["--holdout", "0"]  # as the simulation does
            members.enter_context(process(folder / f"{name}.log", "device", "--coordinator", address, *arguments))
        for line in lines_of(coordinator, folder / "serve.log"):
            print("   ", line, flush=True)
        coordinator.wait()
    report = json.loads((folder / "processes.json").read_text())
    return report["parameters_sha256"], [r["seconds"] for r in report["rounds"][1:]]


def in_process(folder: Path, config: RunConfig, artifact: Any, local: dict[str, Any]) -> tuple[str, list[float]]:
    from hashlib import sha256

    store = Store(str(folder / "in_process.db"))
    trainer = PlanTrainer(artifact, next(iter(artifact.manifest.sets)))
    with store.write() as session:
        publish_artifact(session, read_artifact(artifact.folder), config.channel)
        nodes = {device_named(session, name).id: name for name in local}
    run_id = create_run(store, config)
    app = make_client_app(
        lambda: trainer, lambda context: (str(context.node_config["device"]), local[str(context.node_config["device"])])
    )
    seconds: list[float] = []
    grid = InProcessGrid(store, run_id, app, nodes, artifact.manifest.bytes)
    theta = drive_run(store, run_id, grid, config, on_round=lambda r: seconds.append(r.seconds))
    store.close()
    return sha256(theta.tobytes()).hexdigest(), seconds[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--partition", default="dirichlet:0.3")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = device_names(arguments.devices)
    local = LocalTraining(max_length=64)
    config = RunConfig(rounds=arguments.rounds, min_devices=len(names), seed=arguments.seed, local=local)
    dataset = read_dataset(arguments.data)
    parts = partition(dataset.train, arguments.partition, arguments.devices, arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        artifact = prepare_artifact(arguments.model, dataset, "", folder / "artifact", arguments.seed, local.max_length)
        publish = ["publish", str(artifact.folder), "--channel", "stable", "--database", str(folder / "processes.db")]
        subprocess.run([sys.executable, "-m", "pocketfed.cli", *publish], check=True)
        for name, part in zip(names, parts, strict=True):
            rows = ({"text": dataset.train[i].text, "label": dataset.train[i].label} for i in part)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        wire, wire_seconds = as_processes(folder, config, names)
        trainer = PlanTrainer(artifact, next(iter(artifact.manifest.sets)))
        everything = encode_examples(trainer, dataset.train, local.max_length)
        held = {name: everything.take(part) for name, part in zip(names, parts, strict=True)}
        started = time.monotonic()
        here, here_seconds = in_process(folder, config, artifact, held)
        print(f"in process: {time.monotonic() - started:.1f} s in all")
    print(f"processes  {wire} {[round(s, 1) for s in wire_seconds]}")
    print(f"in process {here} {[round(s, 1) for s in here_seconds]}")
    print("bit-identical" if wire == here else "DIFFERENT")
    return 0 if wire == here else 1


if __name__ == "__main__":
    sys.exit(main())
