"""Running an artifact's plans on stock ONNX Runtime: the trainer every device has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.activations import ActivationCache
from pocketfed.client_sdk.artifact_trainer import CACHE_BYTES, ArtifactTrainer
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.budget import Budget
from pocketfed.client_sdk.errors import ArtifactError
from pocketfed.client_sdk.trainer import Batch, Ids
from pocketfed.model.parameters import Vector
from pocketfed.model.runtime import load_onnxruntime


def open_plan(path: Path, threads: int, compact: bool = False) -> Any:
    """An ONNX Runtime session that keeps to `threads` threads.

    Args:
        compact: hold weights once, not once more in the form that each product likes best: a little slower.

    Raises:
        ArtifactError: the runtime refuses the plan.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Waiting threads must not spin: on a phone that is battery, on a shared box a collapse.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # int8 weights are widened once, when the plan is opened, not at every use.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # In the order of the file, forward then backward: by default what the backward pass reads is made late and kept long.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # Its planner takes time with the square of the number of nodes: 9 s instead of 1 s for a step through 24 layers.
    options.enable_mem_reuse = False
    if compact:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # The runtime raises bare exceptions of many private classes.
        raise ArtifactError(f"ONNX Runtime {onnxruntime.__version__} refuses the plan {path.name}: {error}") from None


class PlanTrainer(ArtifactTrainer):
    """One trainable set of one artifact. Plans are opened when first needed.

    Args:
        threads: for ONNX Runtime; results are bit-reproducible with 1.
        cache: as in `ArtifactTrainer`.
        max_memory_mb: the whole process stays below it; 0: no limit.

    Raises:
        ConfigurationError: max_memory_mb is too little for even one example at a time.
    """

    def __init__(
        self,
        artifact: Artifact,
        trainable_set: str,
        threads: int = 1,
        cache: ActivationCache | None = None,
        max_memory_mb: float = 0.0,
    ) -> None:
        self.budget = Budget(artifact.manifest.set_named(trainable_set), trainable_set, max_memory_mb)
        # Where memory is short, what is kept takes half of it, and not being kept would cost far more than rounding.
        precision = "float16" if self.budget.limit else "float32"
        super().__init__(artifact, trainable_set, cache, self.budget.cache_bytes(CACHE_BYTES), precision)
        self._threads = threads
        self._sessions: dict[str, Any] = {}

    def prepare(self, rows: Sequence[Ids], should_stop: Callable[[], bool] = lambda: False) -> None:
        super().prepare(rows, should_stop)
        if self.budget.limit:
            self._sessions.pop(self.set.prefix, None)  # its weights make room for the training step's

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        parts = self._parts(self._plan_for("train"), batch)
        if len(parts) == 1:
            loss, correct, gradient, _ = self._judge("train", theta, parts[0])
            return float(loss), int(correct), gradient
        total = np.zeros(self.size, np.float32)
        loss_sum, weight_sum, right = 0.0, 0.0, 0
        for part in parts:  # the mean over the batch from the means over its parts
            loss, correct, gradient, weight = self._judge("train", theta, part)
            gradient *= np.float32(weight)
            total += gradient
            loss_sum += float(loss) * float(weight)
            weight_sum += float(weight)
            right += int(correct)
        weight_sum = weight_sum or 1.0  # nothing in the batch counts: loss and gradient are 0
        total /= np.float32(weight_sum)
        return loss_sum / weight_sum, right, total

    def evaluate(self, theta: Vector, batch: Batch) -> tuple[float, int, float]:
        loss_sum, weight_sum, right = 0.0, 0.0, 0
        for part in self._parts(self._plan_for("evaluate"), batch):
            loss, correct, weight = self._judge("evaluate", theta, part)
            loss_sum += float(loss) * float(weight)
            weight_sum += float(weight)
            right += int(correct)
        return loss_sum / (weight_sum or 1.0), right, weight_sum

    def logits(self, theta: Vector, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        feed = {"theta": theta, "input_ids": ids, "attention_mask": mask}
        return np.asarray(self._open("predict", ids.shape[1]).run(["logits"], feed)[0])

    # ---- plans -----------------------------------------------------------------------------------------------------------

    def _open(self, plan: str, tokens: int) -> Any:
        """The session of a plan, by its name in the manifest.

        Raises:
            ConfigurationError: it needs more memory than is allowed.
        """
        file = getattr(self.set, plan)
        if file not in self._sessions:
            self.budget.before_opening(plan, tokens)
            session = open_plan(self.artifact.path(file), self._threads, self.budget.limit > 0)
            theta = [i.shape for i in session.get_inputs() if i.name == "theta"]
            if plan != "prefix" and theta != [[self.size]]:
                raise ArtifactError(
                    f"the plan {file} takes theta of shape {theta}, the manifest says {self.size} values; publish again"
                )
            self._sessions[file] = session
            self.budget.opened(plan)
        return self._sessions[file]

    def _parts(self, plan: str, batch: Batch) -> list[Batch]:
        """The batch in pieces that fit into memory."""
        count, tokens = batch.ids.shape
        self._open(plan, tokens)
        most = self.budget.micro_batch(plan, count, tokens)
        return [batch] if most >= count else [batch.part(i, min(count, i + most)) for i in range(0, count, most)]

    def _plan_for(self, purpose: str) -> str:
        return f"{purpose}_suffix" if self.set.prefix else purpose

    def _judge(self, purpose: str, theta: Vector, batch: Batch) -> Any:
        feed: dict[str, Any] = {"theta": theta, "labels": batch.labels}
        if batch.weights is not None:
            feed["weights"] = batch.weights
        if batch.label_smoothing:
            feed["label_smoothing"] = np.array(batch.label_smoothing, np.float32)
        if self.set.prefix:
            feed["hidden"] = self.hidden(batch)
        else:
            feed["input_ids"] = batch.ids
        if not self.set.prefix or self.set.keeps_tokens:
            feed["attention_mask"] = batch.mask
        outputs = ["loss", "correct", "gradient", "weight"] if purpose == "train" else ["loss", "correct", "weight"]
        return self._open(self._plan_for(purpose), batch.ids.shape[1]).run(outputs, feed)

    def run_prefix(self, ids: Ids) -> NDArray[np.float32]:
        """Of rows of one length, in as many runs as memory asks for."""
        session = self._open("prefix", ids.shape[1])
        most = self.budget.micro_batch("prefix", *ids.shape)
        runs = [
            session.run(["hidden"], {"input_ids": part, "attention_mask": np.ones_like(part)})[0]
            for part in (ids[i : i + most] for i in range(0, len(ids), most))
        ]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)
