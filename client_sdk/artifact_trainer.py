"""What every trainer of an artifact shares: its tokenizer, its starting values, and the memory of its frozen part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pocketfed.client_sdk.activations import ActivationCache, MemoryCache, equal_lengths, key_of
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.errors import ArtifactError, TrainingStopped
from pocketfed.client_sdk.tokenizer import PlanTokenizer, Rows
from pocketfed.client_sdk.trainer import Batch, Ids
from pocketfed.model.parameters import ParametersError, Vector, decode_vector

CACHE_BYTES = 256e6
PREFIX_TOKENS = 1024  # of one run of the prefix: more are no faster, and need more memory


class ArtifactTrainer(ABC):
    """One trainable set of one artifact.

    Where the set has a prefix, what that makes of a text is computed once and kept, over epochs and rounds.

    Args:
        cache: where to keep it; by default in memory, at most `cache_bytes`, as `cache_precision` (see `MemoryCache`).
    """

    def __init__(
        self,
        artifact: Artifact,
        trainable_set: str,
        cache: ActivationCache | None = None,
        cache_bytes: float = CACHE_BYTES,
        cache_precision: str = "float32",
    ) -> None:
        self.artifact = artifact
        self.set, self.set_name = artifact.manifest.set_named(trainable_set), trainable_set
        self.identity = f"{artifact.manifest.version}/{trainable_set}"
        self.size, self.task = self.set.size, artifact.manifest.task
        self.layout = self.set.layout
        self.outputs = len(artifact.manifest.labels)
        self._tokenizer: PlanTokenizer | None = None
        self._cache = cache
        if self.set.prefix and cache is None:
            self._cache = MemoryCache(int(cache_bytes), self.set.hidden_size, self.set.keeps_tokens, cache_precision)

    @abstractmethod
    def run_prefix(self, ids: Ids) -> NDArray[np.float32]:
        """(B, T) rows without padding -> (B, T, hidden_size), or (B, hidden_size)."""

    def initial_theta(self) -> Vector:
        """The values the artifact starts from.

        Raises:
            ArtifactError: they are not what the manifest says.
        """
        try:
            return decode_vector("theta", self.artifact.path(self.set.initial).read_bytes(), self.size)
        except ParametersError as error:
            raise ArtifactError(f"{self.set.initial}: {error}") from None

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None, max_length: int = 0) -> Rows:
        if self._tokenizer is None:
            try:
                self._tokenizer = PlanTokenizer(self.artifact.path(self.artifact.manifest.tokenize))
            except Exception as error:  # as in open_plan
                raise ArtifactError(f"the tokenize plan cannot be opened: {error}") from None
        limit = min(max_length or self.artifact.manifest.max_length, self.artifact.manifest.max_length)
        return self._tokenizer.encode_rows(texts, pairs, limit)

    def prepare(self, rows: Sequence[Ids], should_stop: Callable[[], bool] = lambda: False) -> None:
        """Compute what the prefix makes of the rows, as far as the cache has room."""
        if self._cache is None or not self.set.prefix:
            return
        self._cache.begin()
        unknown = {key_of(row): row for row in rows if self._cache.get(row) is None}
        missing = list(unknown.values())
        for group in equal_lengths(missing, PREFIX_TOKENS):
            if should_stop():
                raise TrainingStopped("stopped while the frozen part of the model read the examples")
            chosen = [missing[i] for i in group]
            for row, hidden in zip(chosen, self.run_prefix(np.stack(chosen)), strict=True):
                self._cache.put(row, hidden)

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """What the prefix makes of the batch: (B, T, hidden_size), zero on padding, or (B, hidden_size)."""
        lengths = batch.mask.sum(1)
        rows = [ids[:n] for ids, n in zip(batch.ids, lengths, strict=True)]
        kept = [self._cache.get(row) if self._cache is not None else None for row in rows]
        shape = (*batch.ids.shape, self.set.hidden_size) if self.set.keeps_tokens else (len(rows), self.set.hidden_size)
        hidden = np.zeros(shape, np.float32)
        missing = [i for i, found in enumerate(kept) if found is None]
        for group in equal_lengths([rows[i] for i in missing], PREFIX_TOKENS):
            chosen = [missing[i] for i in group]
            for i, found in zip(chosen, self.run_prefix(np.stack([rows[i] for i in chosen])), strict=True):
                kept[i] = found
        for i, found in enumerate(kept):
            if self.set.keeps_tokens:
                hidden[i, : lengths[i]] = found
            else:
                hidden[i] = found
        return hidden
