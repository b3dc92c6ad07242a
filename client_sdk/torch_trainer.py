"""The same training in PyTorch, for devices that have it: the artifact's own weights in the lean student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.client_sdk.activations import ActivationCache
from pocketfed.client_sdk.artifact_trainer import CACHE_BYTES, ArtifactTrainer
from pocketfed.client_sdk.artifacts import MANIFEST, Artifact
from pocketfed.client_sdk.errors import ArtifactError, ConfigurationError
from pocketfed.client_sdk.trainer import Batch, Ids
from pocketfed.model.adapters import layout_of, select, set_theta
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lean import lean
from pocketfed.model.losses import task_loss
from pocketfed.model.parameters import Vector, total_size
from pocketfed.model.quantization import dequantize

Precision = Literal["auto", "float32", "bfloat16"]


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere it is emulated, and slower than float32."""
    flags = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # public: only from torch 2.9 on
    return bool(flags is not None and flags())


class TorchTrainer(ArtifactTrainer):
    """Gives what `PlanTrainer` gives, up to rounding, on the artifact's own weights.

    Not compiled: torch.compile took minutes for a step through 24 layers and was no faster than eager (docs/results.md).

    Args:
        precision: of the products; "auto" is bfloat16 where the processor has it. Only float32 agrees with the plans to 1e-4.

    Raises:
        ArtifactError: a plan without the weights that its model needs.
        ConfigurationError: bfloat16 on a processor without it.
    """

    def __init__(
        self,
        artifact: Artifact,
        trainable_set: str,
        precision: Precision = "float32",
        cache: ActivationCache | None = None,
        cache_bytes: float = CACHE_BYTES,
    ) -> None:
        super().__init__(artifact, trainable_set, cache, cache_bytes)
        if precision == "bfloat16" and not has_bfloat16():
            raise ConfigurationError("this processor has no bfloat16 products; use precision float32 or auto")
        self._bfloat16 = precision == "bfloat16" or (precision == "auto" and has_bfloat16())
        self._model = load_student(artifact, trainable_set)
        if total_size(layout_of(self._model)) != self.size:
            raise ArtifactError(
                f"the student of {trainable_set!r} has {total_size(layout_of(self._model))} trainable values, the manifest "
                f"says {self.size}; publish again"
            )
        self._trained = [p for p in self._model.parameters() if p.requires_grad]

    def run_prefix(self, ids: Ids) -> NDArray[np.float32]:
        with torch.no_grad(), self._autocast():
            rows = torch.from_numpy(ids)
            return self._model.prefix(rows, torch.ones_like(rows)).float().numpy()

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        set_theta(self._model, theta)
        loss, correct, _ = self._judge(batch)
        gradients = torch.autograd.grad(loss, self._trained, materialize_grads=True)
        return loss.item(), int(correct), torch.cat([g.reshape(-1) for g in gradients]).numpy()

    def evaluate(self, theta: Vector, batch: Batch) -> tuple[float, int, float]:
        set_theta(self._model, theta)
        with torch.no_grad():
            loss, correct, weight = self._judge(batch)
        return loss.item(), int(correct), weight.item()

    def logits(self, theta: Vector, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        set_theta(self._model, theta)
        with torch.no_grad(), self._autocast():
            return self._model(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()  # type: ignore[no-any-return]

    def _judge(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        with self._autocast():
            hidden = torch.from_numpy(self.hidden(batch)) if self.set.prefix else self._model.prefix(ids, mask)
            logits = self._model.suffix(hidden, mask).float()
        weights = torch.ones(len(ids)) if batch.weights is None else torch.from_numpy(batch.weights)
        smoothing = torch.tensor(batch.label_smoothing)
        return task_loss(self.task, logits, mask, torch.from_numpy(batch.labels), weights, smoothing)

    def _autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16)


def load_student(artifact: Artifact, trainable_set: str) -> TextClassifier:
    """The lean student of a trainable set with the artifact's frozen weights; what is trained waits for a theta.

    Raises:
        ArtifactError: weights are missing or of another shape.
    """
    manifest = json.loads((artifact.folder / MANIFEST).read_bytes())
    config = MobileBertConfig.from_dict(manifest["model"]["config"])
    # The separator is in the plans only; token types follow from it, so it is read off the tokenizer.
    tokenize = onnx.load(str(artifact.path(artifact.manifest.tokenize)), load_external_data=False)
    separator = next(int(p.value) for p in tokenize.metadata_props if p.key == "sep_id")
    model = TextClassifier(config, len(artifact.manifest.labels), separator, artifact.manifest.task)
    model = lean(select(model, trainable_set).eval(), manifest["activations"], tuple(manifest.get("keep", ())))
    described = artifact.manifest.set_named(trainable_set)
    held = _frozen_tensors(artifact.folder, artifact.path(described.train))
    used = {n for n, p in model.named_parameters() if not p.requires_grad}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in held and name in used:
                    parameter.copy_(held[name])
    except RuntimeError as error:
        raise ArtifactError(f"a weight of {described.train} does not fit the student: {error}; publish again") from None
    missing = sorted(n for n in used - set(held) if not _unused(n, config))
    if missing:
        raise ArtifactError(f"{described.train} holds no {missing[0]!r}, which the student needs; publish again")
    return model


def _unused(name: str, config: MobileBertConfig) -> bool:
    """A pooler under mean pooling is in the student and in no plan."""
    return ".pooler." in name and config.pooling == "mean"


def _frozen_tensors(folder: Path, plan: Path) -> dict[str, Tensor]:
    """Name -> float32 values of a plan's external tensors, int8 ones widened."""
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in onnx.load(str(plan), load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            count = int(place["length"]) // dtype.itemsize
            values = np.fromfile(folder / place["location"], dtype, count, offset=int(place["offset"]))
            arrays[tensor.name] = values.reshape(tuple(tensor.dims))
    tensors = {}
    for name, values in arrays.items():
        if name.endswith(".int8"):
            stem = name.removesuffix(".int8")
            tensors[stem] = dequantize(torch.from_numpy(values), torch.from_numpy(arrays[f"{stem}.scale"]))
        elif not name.endswith(".scale"):
            tensors[name] = torch.from_numpy(values)
    return tensors
