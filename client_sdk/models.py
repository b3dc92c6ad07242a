"""The models on a device: fetching those that their publisher stands for, and swapping the one in use."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketfed.client_sdk.artifacts import Artifact, Source, fetch, open_artifact
from pocketfed.client_sdk.errors import ArtifactError, UntrustedError
from pocketfed.client_sdk.home import read_json, write_bytes, write_json
from pocketfed.client_sdk.keeping import Keeping
from pocketfed.client_sdk.link import Link, log
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trust import Trust
from pocketfed.model.parameters import ParametersError, Vector, decode_vector, vector_bytes


@dataclass(frozen=True)
class Model:
    """What the device predicts with. theta: the release's, `released`, with the device's own private parameters in it."""

    trainer: PlanTrainer
    theta: Vector
    release_id: int
    released: Vector


class Models:
    """Artifacts, parameters and open plans of one device.

    Args:
        home: the device's folder.
        keeping: has the device's private parameters.
        lock: held while fetching and swapping; predict() and the background thread do that one after the other.
        threads, max_memory_mb: as `PlanTrainer` has them.
    """

    def __init__(
        self,
        home: Path,
        channel: str,
        link: Link,
        trust: Trust,
        keeping: Keeping,
        lock: threading.RLock,
        threads: int = 1,
        max_memory_mb: float = 0.0,
    ) -> None:
        self._home, self._channel, self._link, self._trust, self._lock = home, channel, link, trust, lock
        self._keeping = keeping
        self._threads, self._max_memory_mb = threads, max_memory_mb
        self._model: Model | None = None
        self._model_lock = threading.Lock()
        self._trainers: dict[tuple[str, str], PlanTrainer] = {}

    # ---- the model in use ------------------------------------------------------------------------------------------------

    def held_release_id(self) -> int:
        return int(read_json(self._home / "release.json").get("id", 0))

    def current(self) -> Model | None:
        """The model in use, opened from disk if this process has not yet."""
        with self._model_lock:
            self._model = self._model or self._on_disk()
            return self._model

    def adopt(self, release: Any, progress: Callable[[float], None] = lambda fraction: None) -> Model:
        """Make a release the model in use: everything is on disk and checked before it is."""
        with self._lock:
            trainer = self.trainer(release.artifact_version, release.trainable_set, progress, release=True)
            data = self._download(release.parameters_digest, trainer.size)
            theta = _checked_vector(data, release.parameters_digest, trainer.size)
            write_bytes(self._theta_file(release.parameters_digest), data)
            held = {
                "id": release.id,
                "artifact": release.artifact_version,
                "set": release.trainable_set,
                "digest": release.parameters_digest,
            }
            self._trust.adopt(release.artifact_version, self._channel)
            write_json(self._home / "release.json", held)  # from here on it is the model in use
            model = Model(trainer, self._keeping.personal(trainer, theta), release.id, theta)
            with self._model_lock:
                self._model = model
            self._forget_others(release.artifact_version, self._theta_file(release.parameters_digest))
            return model

    def _on_disk(self) -> Model | None:
        held = read_json(self._home / "release.json")
        try:
            artifact: Artifact = open_artifact(self._home / "artifacts" / held["artifact"], held["artifact"])
            trainer = PlanTrainer(artifact, held["set"], self._threads, max_memory_mb=self._max_memory_mb)
            theta = _checked_vector(self._theta_file(held["digest"]).read_bytes(), held["digest"], trainer.size)
        except (KeyError, OSError, ArtifactError):
            return None
        return Model(trainer, self._keeping.personal(trainer, theta), int(held["id"]), theta)

    def refresh(self) -> None:
        """The device's private parameters have changed."""
        with self._model_lock:
            if self._model is not None:
                theta = self._keeping.personal(self._model.trainer, self._model.released)
                self._model = dataclasses.replace(self._model, theta=theta)

    def _theta_file(self, digest: str) -> Path:
        return self._home / f"theta-{digest[:16]}.safetensors"

    def _forget_others(self, version: str, theta_file: Path) -> None:
        """Delete artifacts and parameters that nothing on the device uses any more."""
        used = {version, *(held for held, _ in self._trainers)}
        self._trust.forget(used)
        for folder in (self._home / "artifacts").iterdir():
            if folder.name.removesuffix(".partial") not in used:
                shutil.rmtree(folder, ignore_errors=True)
        for file in self._home.glob("theta-*.safetensors"):
            if file != theta_file:
                file.unlink()

    # ---- fetching --------------------------------------------------------------------------------------------------------

    def trainer(
        self,
        version: str,
        trainable_set: str,
        progress: Callable[[float], None] = lambda fraction: None,
        release: bool = False,
    ) -> PlanTrainer:
        """Of an artifact that is fetched first where it is not here, and that its publisher stands for.

        Args:
            progress: told the fraction fetched; what it raises ends the fetch, which goes on there next time.
            release: it is to become the model in use, not only to be trained in an assignment.

        Raises:
            UntrustedError: the publisher does not stand for it. ArtifactError: what came is not what was promised.
            LinkError: from the coordinator.
        """
        key = (version, trainable_set)
        with self._lock:
            source: Source = self._link
            if self._trust.publisher or key not in self._trainers:
                source = self._vouched(version, release)
            if key not in self._trainers:
                artifact, _ = fetch(source, version, self._home / "artifacts", progress)
                # Sessions of older versions go.
                self._trainers = {k: v for k, v in self._trainers.items() if k[0] == version}
                self._trainers[key] = PlanTrainer(
                    artifact, trainable_set, self._threads, max_memory_mb=self._max_memory_mb
                )
            return self._trainers[key]

    def _vouched(self, version: str, release: bool) -> Source:
        """Where to fetch a version from, once its publisher stands for it: not a byte of its files comes before.

        Raises:
            UntrustedError: nobody does whom this device trusts.
        """
        try:
            if self._trust.publisher:
                self._trust.check(version, self._channel, release)
                return self._link
        except UntrustedError as error:
            log.debug("asks again, the publisher may have more to say: %s", error)
        reply = self._link.describe(version)
        if reply.HasField("keys"):
            self._trust.learn_keys(reply.keys)
        if reply.HasField("signed") and self._trust.publisher:
            self._trust.learn_version(version, self._channel, reply.signed)
        self._trust.check(version, self._channel, release)
        return _Described(self._link, bytes(reply.manifest))

    def parameters(self, digest: str, size: int) -> Vector:
        """
        Raises:
            ArtifactError: not `size` values with that digest.
        """
        return _checked_vector(self._download(digest, size), digest, size)

    def _download(self, digest: str, size: int) -> bytes:
        """Parameters' bytes, as they come; no more than `size` float32 values can have."""
        data = bytearray()
        for chunk in self._link.download(digest):
            data += chunk
            if len(data) > vector_bytes(size):
                raise ArtifactError(f"parameters {digest[:12]} have more bytes than {size} values; they are not used")
        return bytes(data)


@dataclass(frozen=True)
class _Described:
    """A Source whose manifest has come already."""

    link: Link
    data: bytes

    def manifest(self, version: str) -> bytes:
        return self.data

    def download(self, digest: str, first_chunk: int) -> Iterator[bytes]:
        return self.link.download(digest, first_chunk)


def _checked_vector(data: bytes, digest: str, size: int) -> Vector:
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(f"parameters do not have the digest {digest[:12]} that they should; they are not used")
    try:
        return decode_vector("theta", data, size)
    except ParametersError as error:
        raise ArtifactError(f"parameters {digest[:12]}: {error}") from None
