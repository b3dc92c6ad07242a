"""What the frozen part of a student made of every text of a simulation: kept once for all devices, in memory and then on disk."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from pocketfed.client_sdk.activations import DiskCache, Hidden, MemoryCache
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.trainer import Ids
from pocketfed.simulations.backends import BackendError

# MB that a cache may hold in memory and on disk, unless the environment says otherwise.
BOUNDS = {"POCKETFED_CACHE_MB": 512, "POCKETFED_CACHE_DISK_MB": 16384}
SEVERAL = 4  # caches of one process; what was used longest ago goes


def bound_of(variable: str) -> int:
    """Bytes.

    Raises:
        BackendError: the environment has no whole number there.
    """
    given = os.environ.get(variable, str(BOUNDS[variable]))
    if not (given.isascii() and given.isdigit() and 0 < int(given) < 1 << 40):
        raise BackendError(f"{variable} is {given[:100]!r}; set it to a whole number of MB from 1")
    return int(given) << 20


class TieredCache:
    """A memory cache, and one on disk for what it has no room for. Both exact: where a text lies changes no bit.

    Raises nothing of its own; what neither has room for is computed again whenever it is needed.
    """

    def __init__(self, memory: MemoryCache, disk: DiskCache) -> None:
        self.memory, self.disk = memory, disk

    def get(self, row: Ids) -> Hidden | None:
        found = self.memory.get(row)
        return self.disk.get(row) if found is None and self.disk.bytes else found

    def put(self, row: Ids, hidden: Hidden) -> None:
        # Not into a full memory: it would drop what another device, that does not train now, will ask for again.
        if self.memory.bytes + hidden.nbytes <= self.memory.limit_bytes:
            self.memory.put(row, hidden)
        else:
            self.disk.put(row, hidden)

    def begin(self) -> None:
        """A device after another uses it, all of the time: nothing here is of an earlier use."""

    def clear(self) -> None:
        self.memory.clear()
        self.disk.clear()

    def close(self) -> None:
        self.memory.clear()
        self.disk.close()


def prefix_key(artifact: Artifact, trainable_set: str) -> str:
    """Names what a set's prefix computes: its plan and the backbone's bytes. Sets that freeze the same blocks share it."""
    files = artifact.manifest.files
    plan = files[artifact.manifest.set_named(trainable_set).prefix].sha256
    weights = sorted(file.sha256 for name, file in files.items() if name.endswith(".bin"))
    return sha256(" ".join([plan, *weights]).encode()).hexdigest()


def open_prefix_cache(
    artifact: Artifact,
    trainable_set: str,
    folder: Path,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> TieredCache | None:
    """A cache for one artifact and set, its file in `folder`; None where the set has no prefix. By default of BOUNDS.

    A folder that outlives the simulation serves the next one: the file's name says what it was made of.
    """
    chosen = artifact.manifest.set_named(trainable_set)
    if not chosen.prefix:
        return None
    shape = (chosen.hidden_size, chosen.keeps_tokens)
    path = folder / f"prefix-{prefix_key(artifact, trainable_set)[:32]}.db"
    memory = bound_of("POCKETFED_CACHE_MB") if memory_bytes is None else memory_bytes
    disk = bound_of("POCKETFED_CACHE_DISK_MB") if disk_bytes is None else disk_bytes
    return TieredCache(MemoryCache(memory, *shape), DiskCache(path, disk, *shape, "float32"))


class PrefixCaches:
    """Of several simulations: those that freeze the same blocks of the same model share one cache, whatever their data.

    Args:
        folder: for what memory has no room for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, TieredCache] = {}

    def cache_for(self, artifact: Artifact, trainable_set: str) -> TieredCache | None:
        if not artifact.manifest.set_named(trainable_set).prefix:
            return None
        key = prefix_key(artifact, trainable_set)
        found = self._held.pop(key, None) or open_prefix_cache(artifact, trainable_set, self.folder)
        if found is not None:
            self._held[key] = found  # the last: used just now
        while len(self._held) > SEVERAL:
            self._held.pop(next(iter(self._held))).close()
        return found

    def close(self) -> None:
        for cache in self._held.values():
            cache.close()
        self._held = {}
