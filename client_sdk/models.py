"""The models on a device: fetching those that their publisher stands for, and swapping the one in use."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk.artifacts import (
    CHUNK_BYTES,
    MANIFEST,
    Artifact,
    Source,
    checked_digest,
    fetch,
    open_artifact,
    parse_manifest,
)
from pocketfed.client_sdk.errors import ArtifactError, UnsupportedError, UntrustedError
from pocketfed.client_sdk.keeping import Keeping
from pocketfed.client_sdk.link import Link, log
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.releases import Held, Shelf, read_shelf, write_shelf
from pocketfed.client_sdk.trainer import pad
from pocketfed.client_sdk.trust import Trust
from pocketfed.model.parameters import ParametersError, Vector, decode_start, start_bytes

TASKS_HERE = ("classification",)  # what `Device.predict` and the examples of an app are made for


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
        room: asked before so many bytes are fetched; raises where there is none.
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
        room: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._home, self._channel, self._link, self._trust, self._lock = home, channel, link, trust, lock
        self._keeping = keeping
        self._threads, self._max_memory_mb, self._room = threads, max_memory_mb, room
        self._model: Model | None = None
        self._labels: tuple[str, tuple[str, ...]] = ("", ())  # of which version
        self._model_lock = threading.Lock()
        self._trainers: dict[tuple[str, str], PlanTrainer] = {}
        self._damaged = False  # the release in use did not open

    # ---- the model in use ------------------------------------------------------------------------------------------------

    @property
    def shelf(self) -> Shelf | None:
        """What the device holds; None before the first release."""
        return read_shelf(self._home / "release.json")

    def held_release_id(self) -> int:
        """The newest release that need not be offered again; 0 for none, also where it was damaged on disk."""
        shelf = self.shelf
        return shelf.newest.id if shelf is not None and not self._damaged else 0

    def labels(self) -> tuple[str, ...]:
        """Of the model in use, read without opening its plans; none where there is no model yet."""
        shelf = self.shelf
        if shelf is None:
            return ()
        version = shelf.in_use.artifact
        if self._labels[0] != version:
            try:
                manifest = parse_manifest((self._home / "artifacts" / version / MANIFEST).read_bytes())
            except (OSError, ArtifactError):
                return ()
            self._labels = (version, tuple(manifest.labels))
        return self._labels[1]

    def current(self) -> Model | None:
        """The model in use, opened from disk if this process has not yet."""
        with self._model_lock:
            shelf = self.shelf
            if self._model is None and shelf is not None:
                self._model = self._open(shelf.in_use)
                if self._model is None:
                    # Fetched anew as soon as the coordinator is asked; until then the one before does.
                    self._damaged = True
                    other = shelf.newest if shelf.went_back else shelf.before
                    self._model = self._open(other) if other is not None else None
            return self._model

    def adopt(self, release: Any, progress: Callable[[float], None] = lambda fraction: None) -> Model:
        """Make a release the model in use: everything is on disk and checked before it is. The one before it stays on disk."""
        with self._lock:
            if release.id <= self.held_release_id() and (held_model := self.current()) is not None:
                return held_model  # another thread has adopted it meanwhile
            trainer = self.trainer(release.artifact_version, release.trainable_set, progress, release=True)
            held = Held(release.id, release.artifact_version, release.trainable_set, release.parameters_digest)
            theta = self.parameters(held.digest, trainer.size, progress)
            _try_out(trainer, theta)
            before = self._in_use_before(held)
            self._trust.adopt(release.artifact_version, self._channel)
            old = self.shelf
            if old is not None and before is None and not self._damaged and not old.went_back:
                shelf = replace(old, newest=held)  # the same again under another number: what it is beside stays
            else:
                shelf = Shelf(held, before, judged=before is None)
            write_shelf(self._home / "release.json", shelf)  # from here on it is the model in use
            model = self._personal(trainer, theta, release.id)
            with self._model_lock:
                self._model, self._damaged = model, False
            self._tidy()
            return model

    def _in_use_before(self, new: Held) -> Held | None:
        """What there is to go back to, and to compare a new release with."""
        shelf = self.shelf
        if shelf is None:
            return None
        kept = shelf.before if self._damaged else shelf.in_use
        return None if kept is None or replace(kept, id=new.id) == new else kept

    def pair_to_judge(self) -> tuple[Model, Model] | None:
        """The release in use and the one before it, as long as nobody has compared them."""
        shelf, new = self.shelf, self.current()
        if shelf is None or shelf.judged or shelf.before is None or new is None or self._damaged:
            return None
        same_plans = (shelf.before.artifact, shelf.before.set) == (shelf.newest.artifact, shelf.newest.set)
        before = self._open(shelf.before, new.trainer if same_plans else None)
        return None if before is None else (new, before)

    def judged(self, release_id: int, report: Mapping[str, Any], before: Model | None) -> bool:
        """Note what the comparison said of a release; `before`: the model to go back to. Returns whether the device did.

        It does not where the publisher no longer stands for that one.
        """
        with self._lock:
            shelf = self.shelf
            if shelf is None or shelf.newest.id != release_id or shelf.before is None:
                return False  # another was adopted meanwhile
            if before is not None:
                try:
                    self._trust.check(shelf.before.artifact, self._channel, release=False)
                except UntrustedError as error:
                    log.warning("release %d is worse here, but: %s", release_id, error)
                    before = None
            told = {**report, "went_back": before is not None} if report else {}
            write_shelf(
                self._home / "release.json",
                replace(shelf, judged=True, went_back=before is not None, report=told),
            )
            if before is not None:
                with self._model_lock:
                    self._model = before
            return before is not None

    def reported(self) -> None:
        """The coordinator has heard what `shelf.report` says."""
        with self._lock:
            shelf = self.shelf
            if shelf is not None and shelf.report:
                write_shelf(self._home / "release.json", replace(shelf, report={}))

    def _open(self, held: Held, trainer: PlanTrainer | None = None) -> Model | None:
        """From disk; None if a byte of it is not what it should be."""
        try:
            if trainer is None:
                artifact: Artifact = open_artifact(self._home / "artifacts" / held.artifact, held.artifact)
                trainer = PlanTrainer(artifact, held.set, self._threads, max_memory_mb=self._max_memory_mb)
            theta, _ = _checked_start(self._theta_path(held.digest).read_bytes(), held.digest, trainer.size)
        except (OSError, ArtifactError) as error:
            log.warning("release %d cannot be opened: %s", held.id, error)
            return None
        return self._personal(trainer, theta, held.id)

    def _personal(self, trainer: PlanTrainer, released: Vector, release_id: int) -> Model:
        return Model(trainer, self._keeping.personal(trainer, released), release_id, released)

    def refresh(self) -> None:
        """The device's private parameters may have changed."""
        with self._model_lock:
            if self._model is not None:
                self._model = self._personal(self._model.trainer, self._model.released, self._model.release_id)

    def _theta_path(self, digest: str) -> Path:
        digest = checked_digest(digest)  # it comes from the network, and names a file
        return self._home / f"theta-{digest[:16]}.safetensors"

    def _tidy(self, also: Container[Path] = ()) -> None:
        """Delete artifacts and parameters that nothing on the device uses any more.

        Args:
            also: a file of parameters to keep, for an assignment.
        """
        shelf = self.shelf
        held = shelf.all if shelf is not None else ()
        used = {h.artifact for h in held} | {version for version, _ in self._trainers}
        self._trust.forget(used)
        for folder in (self._home / "artifacts").iterdir():
            if folder.name.removesuffix(".partial") not in used:
                shutil.rmtree(folder, ignore_errors=True)
        kept = {self._theta_path(h.digest) for h in held}
        for file in self._home.glob("theta-*"):
            if file not in kept and file not in also:
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
                artifact, _ = fetch(source, version, self._home / "artifacts", progress, self._room, TASKS_HERE)
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

    def parameters(self, digest: str, size: int, progress: Callable[[float], None] = lambda fraction: None) -> Vector:
        """As `start`, theta alone."""
        return self.start(digest, size, progress)[0]

    def start(
        self, digest: str, size: int, progress: Callable[[float], None] = lambda fraction: None
    ) -> tuple[Vector, Vector | None]:
        """Values to start from, and the run's control variate if it has one.

        They stay on disk while they are used: a round that is begun again does not download them again.

        Args:
            progress: as in `trainer`.

        Raises:
            ArtifactError: not `size` values with that digest. LinkError: from the coordinator.
        """
        with self._lock:
            path = self._theta_path(digest)
            try:
                return _checked_start(path.read_bytes(), digest, size)
            except (OSError, ArtifactError):
                path.unlink(missing_ok=True)
            values = _checked_start(self._download(digest, size, path.with_suffix(".part"), progress), digest, size)
            os.replace(path.with_suffix(".part"), path)
            self._tidy({path})
            return values

    def _download(self, digest: str, size: int, part: Path, progress: Callable[[float], None]) -> bytes:
        """Parameters' bytes, on from where `part` ends; no more than `size` float32 values, twice, can have.

        A part that turns out wrong in the end is deleted, so that the next attempt begins anew.
        """
        most = start_bytes(size)
        with part.open("a+b") as stream:
            whole = stream.tell() // CHUNK_BYTES
            stream.truncate(whole * CHUNK_BYTES)
            for chunk in self._link.download(digest, whole):
                stream.write(chunk)
                if stream.tell() > most:
                    part.unlink()
                    raise ArtifactError(
                        f"parameters {digest[:12]} have more bytes than {size} values; they are not used"
                    )
                progress(stream.tell() / most)
        data = part.read_bytes()
        if len(data) >= 4 * size and hashlib.sha256(data).hexdigest() != digest:
            part.unlink()
        return data


@dataclass(frozen=True)
class _Described:
    """A Source whose manifest has come already."""

    link: Link
    data: bytes

    def manifest(self, version: str) -> bytes:
        return self.data

    def download(self, digest: str, first_chunk: int) -> Iterator[bytes]:
        return self.link.download(digest, first_chunk)


def _try_out(trainer: PlanTrainer, theta: Vector) -> None:
    """One prediction, before a model takes the place of one that works.

    Raises:
        UnsupportedError: it does not run here, or what it says is no number.
    """
    try:
        logits = trainer.logits(theta, *pad(trainer.encode(["a"])))
    except Exception as error:  # the runtime raises bare exceptions of many private classes
        raise UnsupportedError(
            f"artifact {trainer.artifact.manifest.version[:12]} does not run here: {error}"
        ) from None
    if not np.isfinite(logits).all():
        raise UnsupportedError(
            f"what artifact {trainer.artifact.manifest.version[:12]} predicts with these parameters is no number; they are not used"
        )


def _checked_start(data: bytes, digest: str, size: int) -> tuple[Vector, Vector | None]:
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(f"parameters do not have the digest {digest[:12]} that they should; they are not used")
    try:
        return decode_start(data, size)
    except ParametersError as error:
        raise ArtifactError(f"parameters {digest[:12]}: {error}") from None
