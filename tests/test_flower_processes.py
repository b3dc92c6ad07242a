"""The device code under Flower's own SuperLink and SuperNodes, as processes on loopback: examples/flower."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from pocketfed.client_sdk.artifacts import Artifact
    from pocketfed.coordinator.artifacts import BuiltArtifact
    from pocketfed.model.tasks import Dataset

APP = Path(__file__).resolve().parents[1] / "examples" / "flower"
ROUNDS, NAMES = 2, ("ann", "bob")
LOCAL = {"epochs": 2, "batch_size": 8, "learning_rate": 0.005, "max_length": 32}
PATIENCE_S = 240


def commands(folder: Path) -> Path:
    """Flower's commands as scripts of this interpreter: its processes start each other by name."""
    folder.mkdir()
    for entry in distribution("flwr").entry_points:
        script = folder / entry.name
        code = f"import sys; from {entry.module} import {entry.attr} as main; sys.exit(main())"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
        script.chmod(0o755)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(log: Path, environment: Mapping[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, since it starts others; all of them end with it."""
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command, env=dict(environment), stdout=stream, stderr=stream, cwd=log.parent, start_new_session=True
        )
    try:
        yield child
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)


def until_it_listens(port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert child.poll() is None, log.read_text()
        time.sleep(0.2)  # another program's socket: nothing tells
    raise AssertionError(log.read_text())


def in_our_own_coordinator(folder: Path, built: BuiltArtifact, artifact: Artifact, dataset: Dataset) -> np.ndarray:
    """The same rounds with our store, grid and rounds, under the same strategy of Flower's."""
    from pocketfed.client_sdk.flower_app import make_client_app
    from pocketfed.client_sdk.plan_trainer import PlanTrainer
    from pocketfed.client_sdk.trainer import TrainConfig
    from pocketfed.coordinator.artifacts import publish_artifact
    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.progress import create_run
    from pocketfed.coordinator.rounds import drive_run
    from pocketfed.coordinator.store import Store, device_named
    from pocketfed.simulations.grids import InProcessGrid
    from pocketfed.simulations.run import encode_examples

    store = Store(str(folder / "fleet.db"))
    trainer = PlanTrainer(artifact, "lora:4")
    with store.write() as session:
        publish_artifact(session, built, "stable", "lora:4")
        nodes = {device_named(session, name).id: name for name in NAMES}
    local = {name: encode_examples(trainer, part, 32) for name, part in parts(dataset).items()}
    app = make_client_app(
        lambda: trainer, lambda c: (str(c.node_config["device"]), local[str(c.node_config["device"])])
    )
    # Stock Flower bounds nobody's share.
    config = RunConfig(
        rounds=ROUNDS,
        min_devices=2,
        strategy="FedAvg",
        seed=11,
        examples_factor=0.0,
        clip_factor=0.0,
        local=TrainConfig(**LOCAL),  # type: ignore[arg-type]
    )
    run_id = create_run(store, config)
    theta = drive_run(store, run_id, InProcessGrid(store, run_id, app, nodes, 0), config)
    store.close()
    return theta


def parts(dataset: Dataset) -> dict[str, tuple]:  # type: ignore[type-arg]
    """Unequal, so that the weights matter."""
    return {"ann": dataset.train[:16], "bob": dataset.train[16:56]}


@pytest.mark.slow
def test_stock_superlink_and_supernodes_end_with_our_own_parameters(
    tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    from pocketfed.model.parameters import decode_vector

    for name, examples in parts(tiny_dataset).items():
        rows = [json.dumps({"text": e.text, "label": e.label}) + "\n" for e in examples]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    bin_, port, out = commands(tmp_path / "bin"), free_port(), tmp_path / "theta.safetensors"
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONWARNINGS": "ignore",
    }
    link_log = tmp_path / "superlink.log"
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(
            started(link_log, environment, "flower-superlink", "--insecure", "--port", str(port),
                    "--disable-runtime-dependency-installation"))  # fmt: skip
        until_it_listens(port, link, link_log)
        for name in NAMES:
            config = f'name="{name}" data="{tmp_path / name}.jsonl" artifact="{nano_artifact.folder}"'
            stack.enter_context(
                started(tmp_path / f"{name}.log", environment, "flower-supernode", "--insecure",
                        "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()), "--node-config", config))  # fmt: skip
        settings = {**LOCAL, "artifact": str(nano_artifact.folder), "out": str(out), "trainable-set": "lora:4", "seed": 11,
                    "num-server-rounds": ROUNDS}  # fmt: skip
        given = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in settings.items())
        run = subprocess.run(
            ["flwr", "run", str(APP), "--run-config", given, "--stream"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    logs = "\n".join(p.read_text()[-3000:] for p in sorted(tmp_path.glob("*.log")))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    assert out.is_file(), run.stdout + run.stderr + logs
    ours = in_our_own_coordinator(tmp_path, nano_built, nano_artifact, tiny_dataset)
    theirs = decode_vector("theta", out.read_bytes(), ours.size)
    from pocketfed.client_sdk.plan_trainer import PlanTrainer

    moved = np.abs(ours - PlanTrainer(nano_artifact, "lora:4").initial_theta()).max()
    assert moved > 1e-3  # it was trained at all
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6)
