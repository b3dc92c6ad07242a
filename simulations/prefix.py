"""What the frozen part of a student made of every text of a simulation: kept once for all devices, in memory and then on disk."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from pocketfed.client_sdk.activations import DiskCache, Hidden, MemoryCache
from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.trainer import Ids

MEMORY_BYTES = 512 << 20
DISK_BYTES = 16 << 30
SEVERAL = 4  # caches of one process; what was used longest ago goes


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
    memory_bytes: int = MEMORY_BYTES,
    disk_bytes: int = DISK_BYTES,
) -> TieredCache | None:
    """A cache for one artifact and set, its file in `folder`; None where the set has no prefix.

    A folder that outlives the simulation serves the next one: the file's name says what it was made of.
    """
    chosen = artifact.manifest.set_named(trainable_set)
    if not chosen.prefix:
        return None
    shape = (chosen.hidden_size, chosen.keeps_tokens)
    path = folder / f"prefix-{prefix_key(artifact, trainable_set)[:32]}.db"
    return TieredCache(MemoryCache(memory_bytes, *shape), DiskCache(path, disk_bytes, *shape, "float32"))


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
