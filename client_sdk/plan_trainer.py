"""Running an artifact's plans on stock ONNX Runtime: the trainer every device has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ArtifactError
from pocketfed.client_sdk.tokenizer import PlanTokenizer
from pocketfed.client_sdk.trainer import Batch, Ids
from pocketfed.model.parameters import ParametersError, Vector, decode_vector


def open_plan(path: Path, threads: int) -> Any:
    """An ONNX Runtime session that keeps to `threads` threads.

    Raises:
        ArtifactError: the runtime refuses the plan.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Waiting threads must not spin: on a phone that is battery, on a shared box a collapse.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # The runtime raises bare exceptions of many private classes.
        raise ArtifactError(f"ONNX Runtime {onnxruntime.__version__} refuses the plan {path.name}: {error}") from None


class PlanTrainer:
    """One trainable set of one artifact. Plans are opened when first needed.

    Args:
        threads: for ONNX Runtime; results are bit-reproducible with 1.
    """

    def __init__(self, artifact: Artifact, trainable_set: str, threads: int = 1) -> None:
        self.artifact = artifact
        self.set = artifact.manifest.set_named(trainable_set)
        self.size = self.set.size
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._tokenizer: PlanTokenizer | None = None

    def _session(self, file: str) -> Any:
        if file not in self._sessions:
            self._sessions[file] = open_plan(self.artifact.path(file), self._threads)
        return self._sessions[file]

    def initial_theta(self) -> Vector:
        """The values the artifact starts from.

        Raises:
            ArtifactError: the file does not hold them.
        """
        try:
            return decode_vector("theta", self.artifact.path(self.set.initial).read_bytes(), self.size)
        except ParametersError as error:
            raise ArtifactError(f"{self.set.initial}: {error}") from None

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None = None, max_length: int = 0
    ) -> tuple[Ids, ...]:
        if self._tokenizer is None:
            try:
                self._tokenizer = PlanTokenizer(self.artifact.path(self.artifact.manifest.tokenize))
            except Exception as error:  # as in open_plan
                raise ArtifactError(f"the tokenize plan cannot be opened: {error}") from None
        limit = min(max_length or self.artifact.manifest.max_length, self.artifact.manifest.max_length)
        ids, mask = self._tokenizer.encode(texts, pairs, limit)
        return tuple(row[: int(m.sum())].copy() for row, m in zip(ids, mask, strict=True))

    def gradient(self, theta: Vector, batch: Batch) -> tuple[float, int, Vector]:
        feed = {"theta": theta, "input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}
        loss, correct, gradient = self._session(self.set.train).run(None, feed)
        return float(loss), int(correct), gradient

    def logits(self, theta: Vector, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        feed = {"theta": theta, "input_ids": ids, "attention_mask": mask}
        return np.asarray(self._session(self.set.predict).run(None, feed)[0])
