"""A training that is broken off goes on where it was, to the same bits; what is not its own checkpoint it ignores."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.checkpoint import Checkpoint, fingerprint
from pocketfed.client_sdk.errors import TrainingStopped
from pocketfed.client_sdk.trainer import Batch, Examples, TrainConfig, Trained, train


class Linear:
    """logits = how often each of 4 tokens occurs, times W (4, 3)."""

    identity = "linear"
    size, task, outputs = 12, "classification", 3

    def __init__(self) -> None:
        self.steps = 0

    def encode(self, texts: Any, pairs: Any, max_length: int) -> Any:
        raise NotImplementedError

    def prepare(self, rows: Any, should_stop: Any) -> None:
        pass

    def logits(self, theta: Any, ids: Any, mask: Any) -> Any:
        counts = np.stack([((ids == t) & (mask == 1)).sum(1) for t in range(1, 5)], 1)
        return counts @ theta.reshape(4, 3).astype(np.float64)

    def gradient(self, theta: Any, batch: Batch) -> tuple[float, int, Any]:
        self.steps += 1
        counts = np.stack([((batch.ids == t) & (batch.mask == 1)).sum(1) for t in range(1, 5)], 1)
        p = np.exp(self.logits(theta, batch.ids, batch.mask))
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(p))
        loss, right = -float(np.log(p[rows, batch.labels]).mean()), int((p.argmax(1) == batch.labels).sum())
        p[rows, batch.labels] -= 1
        return loss, right, (counts.T @ p / len(p)).reshape(-1).astype(np.float32)

    def evaluate(self, theta: Any, batch: Batch) -> tuple[float, int, float]:
        loss, right, _ = self.gradient(theta, batch)
        self.steps -= 1
        return loss, right, batch.weight


def make_examples() -> Examples:
    generator = np.random.default_rng(0)
    rows = tuple(generator.integers(1, 5, generator.integers(1, 6)) for _ in range(14))
    return Examples(rows, np.array([int(r[0]) % 3 for r in rows], np.int64))


EXAMPLES = make_examples()
START = np.random.default_rng(1).normal(size=12).astype(np.float32)
CONFIG = TrainConfig(epochs=3, batch_size=4, learning_rate=0.1, schedule="cosine", warmup=0.2, seed=5)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "early stop": {"optimizer": "adamw", "holdout": 0.25, "patience": 2},
}


def stop_after(count: int) -> Callable[[], bool]:
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > count

    return should_stop


def same(a: Trained, b: Trained) -> bool:
    metrics = [{k: v for k, v in t.metrics.items() if k != "seconds"} for t in (a, b)]
    return a.delta.tobytes() == b.delta.tobytes() and metrics[0] == metrics[1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_stopped_at_any_step_it_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **OPTIMIZERS[kind])
    whole = train(Linear(), START, EXAMPLES, config)
    total = int(whole.metrics["steps"])
    assert total == (9 if kind == "early stop" else 12)
    for count in range(total + (3 if kind == "early stop" else 0)):
        path = tmp_path / f"{count}.safetensors"
        with pytest.raises(TrainingStopped):
            train(Linear(), START, EXAMPLES, config, stop_after(count), checkpoint=Checkpoint(path))
        trainer = Linear()
        resumed = train(trainer, START, EXAMPLES, config, checkpoint=Checkpoint(path))
        assert same(resumed, whole), f"stopped at {count}"
        assert not path.exists(), "what is done needs no checkpoint"
        assert trainer.steps == total - _done(count, kind)


def _done(asked: int, kind: str) -> int:
    """Steps that had been taken when the stop came: with a holdout, it is asked before every measurement too."""
    if kind != "early stop":
        return asked
    per_epoch = 3  # of 11 examples in batches of 4, then one measurement of 3
    return asked // (per_epoch + 1) * per_epoch + min(per_epoch, asked % (per_epoch + 1))


def test_stopped_again_and_again_it_still_comes_to_the_same_bits(tmp_path: Path) -> None:
    whole = train(Linear(), START, EXAMPLES, CONFIG)
    path, trainer = tmp_path / "kept.safetensors", Linear()
    for _ in range(11):
        with pytest.raises(TrainingStopped):
            train(trainer, START, EXAMPLES, CONFIG, stop_after(1), checkpoint=Checkpoint(path))
    assert same(train(trainer, START, EXAMPLES, CONFIG, checkpoint=Checkpoint(path)), whole)
    assert trainer.steps == 12, "no step was taken twice"


def interrupted(path: Path, config: TrainConfig = CONFIG, examples: Examples = EXAMPLES, start: Any = START) -> None:
    with pytest.raises(TrainingStopped):
        train(Linear(), start, examples, config, stop_after(5), checkpoint=Checkpoint(path))


@pytest.mark.parametrize(
    "other",
    [
        {"config": dataclasses.replace(CONFIG, learning_rate=0.2)},
        {"config": dataclasses.replace(CONFIG, seed=6)},
        {"config": dataclasses.replace(CONFIG, label_smoothing=0.1)},
        {"examples": EXAMPLES.take(range(1, 14))},
        {"examples": dataclasses.replace(EXAMPLES, weights=np.full(14, 2, np.float32))},
        {"examples": dataclasses.replace(EXAMPLES, labels=(np.asarray(EXAMPLES.labels) + 1) % 3)},
        {"start": START + 1},
    ],
    ids=["rate", "seed", "smoothing", "an example less", "weights", "labels", "parameters"],
)
def test_another_trainings_checkpoint_is_ignored(other: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    interrupted(path, **other)
    trainer = Linear()
    got = train(trainer, START, EXAMPLES, CONFIG, checkpoint=Checkpoint(path))
    assert trainer.steps == 12
    assert same(got, train(Linear(), START, EXAMPLES, CONFIG))


def test_fault_27_a_damaged_checkpoint_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    interrupted(path)
    whole = path.read_bytes()
    wanted = train(Linear(), START, EXAMPLES, CONFIG)
    damaged = [b"", b"not a checkpoint", whole[:-1], whole[: len(whole) // 2], b"\xff" * 8 + whole[8:], whole + b"more"]
    damaged += [whole.replace(b"moment_1", b"momentum"), whole.replace(b'\\"epoch\\"', b'\\"eboch\\"')]
    for data in damaged:
        assert data != whole
        path.write_bytes(data)
        trainer = Linear()
        got = train(trainer, START, EXAMPLES, CONFIG, checkpoint=Checkpoint(path))
        assert (trainer.steps, same(got, wanted)) == (12, True)


def test_one_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    interrupted(path)
    whole = path.read_bytes()
    wanted = train(Linear(), START, EXAMPLES, CONFIG)
    for position in range(8, len(whole), max(1, len(whole) // 60)):
        data = bytearray(whole)
        data[position] ^= 4
        path.write_bytes(data)
        assert same(train(Linear(), START, EXAMPLES, CONFIG, checkpoint=Checkpoint(path)), wanted), position


def test_it_is_written_every_so_often_without_a_stop(tmp_path: Path) -> None:
    seen: list[bool] = []
    for every_s in (0.0, 1e9):
        path = tmp_path / f"{every_s}.safetensors"
        train(
            Linear(), START, EXAMPLES, CONFIG, progress=lambda f: seen.append(path.exists()),  # noqa: B023
            checkpoint=Checkpoint(path, every_s),
        )  # fmt: skip
    assert seen == [True] * 12 + [False] * 12


def test_fault_27_a_write_that_breaks_off_costs_neither_the_training_nor_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.safetensors"
    interrupted(path)
    before = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(TrainingStopped):
        train(Linear(), START, EXAMPLES, CONFIG, stop_after(2), checkpoint=Checkpoint(path))
    assert path.read_bytes() == before


def test_a_fingerprint_is_of_all_that_decides_and_the_same_each_time() -> None:
    first = fingerprint("a", START, EXAMPLES, CONFIG)
    assert first == fingerprint("a", START.copy(), make_examples(), dataclasses.replace(CONFIG))
    merged = Examples((np.concatenate(EXAMPLES.rows[:2]), *EXAMPLES.rows[2:]), EXAMPLES.labels)
    assert first != fingerprint("b", START, EXAMPLES, CONFIG), "another model is another training"
    assert first != fingerprint("a", START, merged, CONFIG), "rows run together are other rows"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import CONFIG, EXAMPLES, START, Linear, train
from pocketfed.client_sdk.checkpoint import Checkpoint

def progress(fraction):
    if fraction > 0.5:  # in the second of three epochs
        os.kill(os.getpid(), signal.SIGKILL)

train(Linear(), START, EXAMPLES, CONFIG, progress=progress, checkpoint=Checkpoint(Path(sys.argv[2]), 0.0))
"""


def test_a_process_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.exists()
    trainer = Linear()
    resumed = train(trainer, START, EXAMPLES, CONFIG, checkpoint=Checkpoint(path))
    assert trainer.steps == 12 - 7
    assert same(resumed, train(Linear(), START, EXAMPLES, CONFIG))
