"""What virtual devices are made of, in files: for the processes of a pool and for other machines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from pocketfed.client_sdk.artifacts import open_artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples
from pocketfed.simulations.grids import DeviceMaterial
from pocketfed.simulations.prefix import open_prefix_cache

FILE = "examples.safetensors"
Array = NDArray[Any]


def share(material: DeviceMaterial) -> Path:
    """Write everything but the artifact, which is named; returns the folder for `open_shared`."""
    examples = material.examples
    arrays = _joined("rows", examples.rows) | _joined(
        "parts", [np.asarray(p, np.int64) for p in material.parts.values()]
    )
    labels = examples.labels
    arrays |= {"labels": labels} if isinstance(labels, np.ndarray) else _joined("labels", labels)
    if examples.weights is not None:
        arrays["weights"] = examples.weights
    artifact = material.trainer.artifact
    told = {
        "artifact": str(artifact.folder.resolve()),
        "version": artifact.manifest.version,
        "trainable_set": material.trainer.set_name,
        "devices": list(material.parts),
        "truncated": examples.truncated,
        "ragged": not isinstance(labels, np.ndarray),
    }
    folder = material.scratch / "shared"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(folder / FILE), {"told": json.dumps(told)})
    return folder


def open_shared(folder: Path) -> DeviceMaterial:
    """What `share` wrote, with a trainer and a cache of this process's own."""
    with safe_open(str(folder / FILE), "np") as file:
        told = json.loads(file.metadata()["told"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    labels = _parted("labels", arrays) if told["ragged"] else arrays["labels"]
    examples = Examples(_parted("rows", arrays), labels, arrays.get("weights"), told["truncated"])
    parts = dict(zip(told["devices"], _parted("parts", arrays), strict=True))
    artifact, chosen = open_artifact(Path(told["artifact"]), told["version"]), told["trainable_set"]
    cache = open_prefix_cache(artifact, chosen, folder / f"process-{os.getpid()}")
    trainer = PlanTrainer(artifact, chosen, cache=cache)
    return DeviceMaterial(trainer, examples, parts, folder)


def _joined(name: str, arrays: Sequence[Array]) -> dict[str, Array]:
    """Arrays of different lengths as one, with their lengths."""
    whole = np.concatenate(arrays) if len(arrays) else np.zeros(0, np.int64)
    return {name: whole, f"{name}.lengths": np.array([len(a) for a in arrays], np.int64)}


def _parted(name: str, arrays: dict[str, Array]) -> list[Array]:
    """Views of what `_joined` joined."""
    return np.split(arrays[name], np.cumsum(arrays[f"{name}.lengths"])[:-1])
