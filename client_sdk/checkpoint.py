"""Local training, interrupted and gone on with: the same bits as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

log = logging.getLogger("pocketfed")

if TYPE_CHECKING:
    from pocketfed.client_sdk.trainer import Examples, TrainConfig, _State
    from pocketfed.model.parameters import Vector

FIELDS = (
    "epoch",
    "steps",
    "steps_in_epoch",
    "loss_sum",
    "weight",
    "right",
    "answers",
    "best_loss",
    "bad_epochs",
    "first_loss",
)


class Checkpoint:
    """A file that holds one training's state: parameters, moments, position.

    Args:
        every_s: how often it is written while training goes on; a stop always writes it.
    """

    def __init__(self, path: Path, every_s: float = 30.0) -> None:
        self.path, self.every_s = path, every_s
        self._fingerprint = ""
        self._saved_at = time.monotonic()

    def restore(self, state: _State, fingerprint: str) -> bool:
        """Fill `state` from the file, if there is one and it is of this very training; whether it did."""
        self._fingerprint = fingerprint
        try:
            with safe_open(str(self.path), "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != fingerprint:
                    return False
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if metadata["digest"] != _digest(metadata["state"], arrays):
                return False
            values = json.loads(metadata["state"])
            fields = {name: values[name] for name in FIELDS}
            moments = [arrays[f"moment_{i}"] for i in range(int(values["moments"]))]
            if any(a.shape != state.current.shape or a.dtype != np.float32 for a in arrays.values()):
                return False
            state.current, state.best = arrays["current"], arrays["best"]
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return False  # none, or damaged: training begins anew
        for name, value in fields.items():
            setattr(state, name, value)
        state.optimizer.restore(int(values["optimizer_steps"]), moments)
        return True

    def save(self, state: _State) -> None:
        """Write it as a whole or not at all: a full disk costs the checkpoint, not the training."""
        self._saved_at = time.monotonic()
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self._write(state, partial)
        except (OSError, SafetensorError) as error:
            log.warning("the training cannot be written down, it goes on without: %s", error)
            partial.unlink(missing_ok=True)

    def _write(self, state: _State, partial: Path) -> None:
        steps, moments = state.optimizer.state()
        values: dict[str, Any] = {name: getattr(state, name) for name in FIELDS}
        values |= {"optimizer_steps": steps, "moments": len(moments)}
        arrays = {"current": state.current, "best": state.best} | {f"moment_{i}": m for i, m in enumerate(moments)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = json.dumps(values)
        metadata = {"fingerprint": self._fingerprint, "state": told, "digest": _digest(told, arrays)}
        save_file(arrays, str(partial), metadata)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, self.path)

    def tick(self, state: _State) -> None:
        """Write it if it is time to."""
        if time.monotonic() - self._saved_at >= self.every_s:
            self.save(state)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _digest(told: str, arrays: Mapping[str, Vector]) -> str:
    """Of all that a checkpoint holds: storage that loses a bit must not change what is trained."""
    digest = hashlib.sha256(told.encode())
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()


def fingerprint(identity: str, theta: Vector, examples: Examples, config: TrainConfig) -> str:
    """Names one training: the same model, start, examples, order and configuration."""
    digest = hashlib.sha256(f"{identity} {config!r}".encode())
    for array in _arrays(theta, examples):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _arrays(theta: Vector, examples: Examples) -> Iterable[np.ndarray[Any, Any]]:
    yield theta
    yield from examples.rows
    yield from (examples.labels,) if isinstance(examples.labels, np.ndarray) else examples.labels
    if examples.weights is not None:
        yield examples.weights
