"""Simulated fleets: our backends and stock Flower on Ray, the same student, data, partition, seeds and local epochs.

    python benchmarks/simulation.py --model STUDENT --data DATA/snips --devices 100 --rounds 5 --target 0.9 --repeats 3
    python benchmarks/simulation.py --variants in-process,batched,processes:2 --devices 1000,10000 --rounds 2
    python benchmarks/simulation.py --variant flower --model nano --devices 20 --rounds 2        # one JSON line, this process

Every variant of every size runs in a fresh process, A B C, A B C, ...; a table is printed at the end. Without data the demo's made-up
commands are used. Ours trains `--train` and sends that; Flower's ClientApp is its Hugging Face quickstart: a plain loop over all
weights, and all weights sent. Seconds begin when the start has been measured and end with a round's measurement of the test
split; the training plans, the pool's start and Flower's actors fall into the first round, Ray's own start into none. Memory and CPU are
those of the whole tree of processes, looked at twice a second: memory shared by processes is counted once (PSS). Needs
'pocketfed[benchmarks,ray]'.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from harness import BenchmarkError, interleaved, ratio, table

VARIANTS = "in-process, batched, processes:COUNT, ray:COUNT or flower"
COLUMNS = {
    "seconds_first_round": "s, first round",
    "seconds_round": "s a round after it",
    "rounds_per_s": "rounds a s",
    "ms_device_round": "ms a device-round",
    "seconds_to_target": "s to the target",
    "cpu_s_to_target": "CPU s to the target",
    "accuracy": "accuracy",
    "peak_mb": "peak MB",
    "cpu_s": "CPU s",
    "bytes_up": "bytes up",
}
CLOCK = os.sysconf("SC_CLK_TCK")


class Tree:
    """What this process and all below it use: the most memory at once, and CPU, those that have ended included."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._cpu: dict[tuple[int, str], float] = {}  # (pid, when it began) -> seconds
        self._looking, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.look()
            if self._ended.wait(0.5):
                return

    def look(self) -> float:
        """Returns the CPU seconds until now."""
        with self._looking:
            self._look()
            return sum(self._cpu.values())

    def _look(self) -> None:
        stats = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stats[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
        mine = {os.getpid()}
        for pid in sorted(stats):
            if int(stats[pid][1]) in mine:
                mine.add(pid)
        held = 0.0
        for pid in mine & set(stats):
            fields = stats[pid]
            self._cpu[pid, fields[19]] = (int(fields[11]) + int(fields[12])) / CLOCK
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                held += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024 / 1e6
            except (OSError, StopIteration):
                continue
        self.peak_mb = max(self.peak_mb, held)

    def stop(self) -> float:
        """Returns the CPU seconds."""
        self._ended.set()
        self._thread.join()
        return self.look()


@dataclass
class Course:
    """When a run began, and when each of its rounds was measured: seconds, CPU seconds of the tree, accuracy."""

    tree: Tree
    began: tuple[float, float] = (0.0, 0.0)
    rounds: list[tuple[float, float, float]] = field(default_factory=list)

    def begin(self) -> None:
        self.began = (time.perf_counter(), self.tree.look())

    def measured(self, accuracy: float) -> None:
        self.rounds.append((time.perf_counter(), self.tree.look(), accuracy))
        seconds, cpu = (late - early for late, early in zip(self.rounds[-1], self.began, strict=False))
        print(f"round {len(self.rounds)}: {accuracy:.4f} after {seconds:.1f} s, {cpu:.1f} s of CPU", file=sys.stderr)

    def reached(self, target: float) -> tuple[float, float] | None:
        """Seconds and CPU seconds until the first round that had it."""
        for moment, cpu, accuracy in self.rounds:
            if accuracy >= target:
                return moment - self.began[0], cpu - self.began[1]
        return None


def run_variant(variant: str, a: argparse.Namespace, devices: int) -> dict[str, Any]:
    """One run in this process."""
    course = Course(Tree())
    bytes_up = (run_flower if variant == "flower" else run_ours)(variant, a, devices, course)
    cpu = course.tree.stop()
    moments = [course.began[0], *(moment for moment, _, _ in course.rounds)]
    seconds = [late - early for early, late in itertools.pairwise(moments)]
    rest = seconds[1:] or seconds
    reached = course.reached(a.target)
    return {
        "variant": variant,
        "train": "all" if variant == "flower" else trained_by(a),
        "devices": devices,
        "seed": a.seed,
        "rounds": len(course.rounds),
        "seconds_first_round": round(seconds[0], 3),
        "seconds_round": round(statistics.median(rest), 3),
        "rounds_per_s": round(1 / statistics.median(rest), 4),
        "ms_device_round": round(statistics.median(rest) / devices * 1e3, 3),
        "seconds_to_target": round(reached[0], 3) if reached else None,
        "cpu_s_to_target": round(reached[1], 2) if reached else None,
        "accuracies": [round(accuracy, 4) for _, _, accuracy in course.rounds],
        "accuracy": round(course.rounds[-1][2], 4),
        "peak_mb": round(course.tree.peak_mb, 1),
        "cpu_s": round(cpu, 1),
        "bytes_up": bytes_up,
    }


def trained_by(a: argparse.Namespace) -> str:
    return str(a.train) if Path(a.model).exists() else "full"


def run_ours(backend: str, a: argparse.Namespace, devices: int, course: Course) -> int:
    """Returns the bytes that all devices sent. It ends with the round that reaches the target."""
    from pocketfed.coordinator.config import LocalTraining, RunConfig
    from pocketfed.coordinator.progress import Interrupted, RoundResult
    from pocketfed.simulations.run import SimulationConfig, simulate

    sent = [0]

    def remember(result: RoundResult) -> None:
        sent[0] += result.bytes_up
        if result.number:
            course.measured(result.accuracy or 0.0)
        else:
            course.begin()  # measuring what the run starts from is no part of a round

    local = LocalTraining(a.epochs, a.batch, a.learning_rate, max_length=a.length)
    run = RunConfig(rounds=a.rounds, min_devices=1, seed=a.seed, local=local)
    config = SimulationConfig(a.data, a.model, devices, a.partition, trained_by(a), run, backend=backend)
    with contextlib.suppress(Interrupted):  # the target was reached: what comes after is not asked for
        simulate(config, on_round=remember, should_stop=lambda: course.reached(a.target) is not None)
    return sent[0]


# ---- stock Flower ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def prepared(model: str, data: str, length: int, seed: int, devices: int, partition: str) -> tuple[Any, Any, Any]:
    """The network, each device's examples and the test split; once a process."""
    import peers
    import torch

    from pocketfed.model.tasks import read_dataset
    from pocketfed.simulations.partition import partition as deal

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net, train, read_test = peers._prepare(model, Path(data), length, seed, 0, False, peers.PEERS["flower"])
    dataset = read_dataset(Path(data)).with_test(seed=seed)
    # `_prepare` shuffles: back to the order of the data, so that a device holds here what it holds in ours.
    back = np.argsort(np.asarray(peers.chosen(len(dataset.train), 0, seed)))
    rows, labels = [train.rows[i] for i in back], [train.labels[i] for i in back]
    parts = deal(dataset.train, partition, devices, seed)
    held = [peers.Encoded([rows[i] for i in part], [labels[i] for i in part]) for part in parts]
    return net, held, read_test()


def run_flower(variant: str, a: argparse.Namespace, devices: int, course: Course) -> int:
    """Flower's own simulation as it comes: FedAvg, its Ray backend with one processor a client. Returns the bytes sent."""
    from pocketfed.coordinator import flwr_compat  # before flwr: it silences it

    # isort: split
    import peers
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from pocketfed.simulations.flower_ray import start_ray

    given = (a.model, str(a.data), a.length, a.seed, devices, a.partition)
    folder, epochs, batch, rate, seed = (
        os.path.dirname(os.path.abspath(__file__)),
        a.epochs,
        a.batch,
        a.flower_rate,
        a.seed,
    )
    net, _, test = prepared(*given)
    client, server = ClientApp(), ServerApp()

    @client.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        sys.path.insert(0, folder)
        import peers
        import simulation

        mine, held, _ = simulation.prepared(*given)
        data = held[int(context.node_config["partition-id"])]
        mine.load_state_dict(message.content["arrays"].to_torch_state_dict())
        order = np.random.Generator(np.random.PCG64([seed, int(context.node_config["partition-id"])]))
        peers._fit(mine, data, peers.PEERS["flower"], batch, 0, epochs, rate, False, order, [], [])
        content = {"arrays": ArrayRecord(mine.state_dict()), "metrics": MetricRecord({"num-examples": len(data.rows)})}
        return Message(RecordDict(content), reply_to=message)

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        net.load_state_dict(arrays.to_torch_state_dict())
        net.eval()
        accuracy = peers._accuracy(net, test)
        if number:
            course.measured(accuracy)
        else:
            course.begin()
        return MetricRecord({"accuracy": accuracy})

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices
        )
        strategy.start(
            grid,
            ArrayRecord(net.state_dict()),
            num_rounds=a.flower_rounds or a.rounds,
            timeout=36000,
            evaluate_fn=evaluate,
        )

    flwr_compat.enter_run(1)
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default its workers stand back for all else on the machine
    start_ray(a.actors, object_store_memory=512 << 20)  # with its tries; Flower finds it running
    actors = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=devices, backend_config=actors)
    sent = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    return sent * devices * len(course.rounds)


# ---- command -----------------------------------------------------------------------------------------------------------


def words(variant: str, devices: int, a: argparse.Namespace) -> list[str]:
    given = {k: v for k, v in vars(a).items() if k not in ("variant", "variants", "devices", "repeats", "out")}
    command = [sys.executable, os.path.abspath(__file__), "--variant", variant, "--devices", str(devices)]
    return command + [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def made_up(folder: Path) -> Path:
    from pocketfed.simulations.data import assistant_dataset, write_dataset

    write_dataset(assistant_dataset(0, users=200, utterances_per_user=100), folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="in-process,batched,processes:2,flower", help=VARIANTS)
    parser.add_argument("--variant", help="one of them, here, as one JSON line")
    parser.add_argument("--model", default="nano", help="a model folder, or a preset whose students start untrained")
    parser.add_argument("--data", type=Path, help="labelled texts; by default 20,000 made-up commands of 200 people")
    parser.add_argument(
        "--train", default="lora:8@6", help="what ours trains of a model folder; of a preset everything"
    )
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--devices", default="100", help="sizes, e.g. 100,1000,10000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--flower-rounds", type=int, default=0, help="of stock Flower, which does not end at the target"
    )
    parser.add_argument("--epochs", type=int, default=1, help="local ones")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--flower-rate", type=float, default=1e-4, help="all weights take smaller steps than a few")
    parser.add_argument("--actors", type=int, default=2, help="of Ray, for stock Flower")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        a.data = a.data or made_up(Path(scratch))
        try:
            if a.variant:
                print(json.dumps(run_variant(a.variant, a, int(a.devices))))
                return
            for devices in map(int, a.devices.split(",")):
                commands = {v: words(v, devices, a) for v in a.variants.split(",")}
                results = interleaved(commands, a.repeats, 1, lambda name, row: print(json.dumps(row), flush=True))
                print(f"\n{devices} devices\n\n{table(results, COLUMNS)}")
                base = results.get("in-process")
                for name, rows in results.items() if base else ():
                    print(f"{name}: {ratio(base, rows, 'seconds_round')} times in-process's seconds a round")
                if a.out:
                    with a.out.open("a") as stream:
                        stream.writelines(json.dumps(row) + "\n" for rows in results.values() for row in rows)
        except BenchmarkError as error:
            sys.exit(f"{Path(__file__).name}: {error}")


if __name__ == "__main__":
    main()
