"""The class an app holds: examples in, predictions out, and a background thread that takes part in rounds.

device = Device("127.0.0.1:8765", home="~/.my-app/pocketfed")
device.add_examples([("play some jazz", "play_music")])
device.start()
device.predict("put on a record").label
device.stop()
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketfed.client_sdk.artifacts import Artifact, Source, fetch, open_artifact
from pocketfed.client_sdk.checkpoint import Checkpoint
from pocketfed.client_sdk.errors import (
    ArtifactError,
    ConfigurationError,
    PocketfedError,
    TrainingStopped,
    UntrustedError,
)
from pocketfed.client_sdk.examples import Added, ExampleStore
from pocketfed.client_sdk.link import Cancelled, Link, Refused, Unreachable, is_loopback, log
from pocketfed.client_sdk.perform import Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, Trained, pad
from pocketfed.client_sdk.trust import Trust
from pocketfed.model.parameters import ParametersError, Vector, decode_vector, encode_vector, vector_bytes
from pocketfed.protos import fleet_pb2 as fleet

CHECK_IN_S = 20.0  # how long a long poll stays open
BACKOFF_S = (0.2, 30.0)  # shortest and longest pause after a failure
LONGEST_WAIT_S = 3600.0  # whatever the coordinator says
SHORTEST_BEAT_S = 0.1
RESUMABLE = ("OUT_OF_RANGE", "DATA_LOSS")  # an upload's refusals after which to ask where it stands and go on


@dataclass(frozen=True)
class Prediction:
    """probability: of the label, 0 to 1; probabilities: of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Model:
    """What the device predicts with."""

    trainer: PlanTrainer
    theta: Vector
    release_id: int


class Device:
    """One device of a fleet. Works from several threads; `start()` and `stop()` may be called more than once.

    Args:
        coordinator: HOST:PORT.
        home: a folder for this device alone; everything the SDK writes lies in it.
        name: unique in the fleet, kept in home; by default a random one.
        channel: whose releases to follow.
        enrolment_key: where the coordinator asks for one.
        ca: a PEM file with the authority that signed the coordinator's certificate; by default the system's are asked.
        publisher: the root key (64 hex digits) whose artifacts to run; by default the first that is met is pinned.
        allow_plaintext_off_loopback: no TLS to another machine.
        threads: for ONNX Runtime; with 1 an update is bit-reproducible.
        max_memory_mb: the process stays below it while it computes, or says what it would need; 0: no limit.
        on_status: told, in words, whenever `status()` changes; may be called from the background thread.

    Raises:
        ConfigurationError: an address without port, a home that cannot be written, or one used by another process.
    """

    def __init__(
        self,
        coordinator: str,
        home: str | os.PathLike[str],
        *,
        name: str | None = None,
        channel: str = "stable",
        enrolment_key: str = "",
        ca: str | os.PathLike[str] | None = None,
        publisher: str = "",
        allow_plaintext_off_loopback: bool = False,
        threads: int = 1,
        max_memory_mb: float = 0.0,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        self.home = Path(home).expanduser()
        self._lock_file = _claim(self.home)
        try:
            identity = _read_json(self.home / "identity.json")
            if name is not None and identity.get("name", name) != name:
                raise ConfigurationError(
                    f"{self.home} belongs to device {identity['name']!r}, not {name!r}; give each device a home of its own"
                )
            self.name: str = identity.get("name") or name or f"device-{uuid.uuid4().hex[:12]}"
            self.channel = channel
            self._enrolment_key, self._on_status = enrolment_key, on_status
            self._threads, self._max_memory_mb = threads, max_memory_mb
            token = identity.get("token", "") if identity.get("enrolled") else ""
            self._link = Link(coordinator, token, ca, allow_plaintext_off_loopback)
            # What lies on this machine's own disk may be unsigned: a simulation's, or a first try.
            own_machine = is_loopback(coordinator.rpartition(":")[0])
            self._trust = Trust(self.home / "trust.json", publisher, unsigned=own_machine)
            self.examples = ExampleStore(self.home / "examples.db")
        except BaseException:
            _release(self._lock_file)
            raise
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._status = "not started"
        self._model: Model | None = None
        self._trainers: dict[tuple[str, str], PlanTrainer] = {}
        self._encoded: tuple[Any, Examples] | None = None
        self._model_lock = threading.Lock()
        self._setup_lock = threading.RLock()  # predict() and the background thread enrol and fetch one after the other
        self._lifecycle = threading.Lock()
        self._refused: tuple[int, str] = (0, "")  # a release that is not taken, and why
        self._failing = False  # the last attempt to talk to the coordinator failed
        self._closed = False

    # ---- for the app -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_examples(self, examples: Iterable[tuple[str, str | None] | tuple[str, str | None, str | None]]) -> Added:
        """Keep (text, label) or (text, label, second text) on this device. Unusable ones are skipped and counted.

        Raises:
            ConfigurationError: a text instead of a list of examples, or the device was closed.
        """
        self._require_open()
        return self.examples.add(examples)

    def predict(self, text: str, text_pair: str | None = None) -> Prediction:
        """The label of a text, by the newest model on the device (fetched now if there is none yet).

        Raises:
            LinkError: no model yet and no coordinator to get one from.
            ConfigurationError: the device was closed.
        """
        self._require_open()
        model = self._current_model()
        rows = model.trainer.encode([text], [text_pair])
        logits = model.trainer.logits(model.theta, *pad(rows))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        labels = model.trainer.artifact.manifest.labels
        best = int(shares.argmax())
        return Prediction(labels[best], float(shares[best]), dict(zip(labels, map(float, shares), strict=True)))

    def enrol(self) -> None:
        """Make the device known to the coordinator now; otherwise it is when it first needs to be.

        Raises:
            LinkError: unreachable, or refused (the name is another device's, the enrolment key is wrong).
        """
        self._require_open()
        self._ensure_enrolled()

    def fetch(self) -> bool:
        """Fetch the channel's newest release now, if it is newer than what the device holds. True if it was.

        Raises:
            LinkError: unreachable, or nothing is released. ArtifactError: what came is not what was promised.
        """
        self.enrol()
        release = self._link.latest(self.channel).release
        if release.id <= self._held_release_id():
            return False
        self._adopt(release)
        return True

    def start(self) -> None:
        """Take part in rounds from a background thread; returns at once.

        Raises:
            ConfigurationError: the device was closed.
        """
        self._require_open()
        with self._lifecycle:
            if self._thread is None or not self._thread.is_alive():
                self._stopping.clear()
                self._thread = threading.Thread(target=self._run, name=f"pocketfed-{self.name}", daemon=True)
                self._thread.start()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigurationError(f"device {self.name!r} was closed; make a new one")

    def stop(self) -> None:
        """Stop taking part; returns when the background thread has ended, at most one training step later.

        Calls to the coordinator that are under way end, a `predict()` that fetches its first model among them.
        """
        self._stopping.set()
        thread = self._thread
        if thread is threading.current_thread():  # from a callback: the thread ends when that returns
            return
        with self._lifecycle:
            while thread is not None and thread.is_alive():
                self._link.cancel()
                thread.join(0.1)  # once more, for a call that began just then
            self._thread = None

    def close(self) -> None:
        """Stop, and let go of home."""
        if not self._closed:
            self.stop()
            self._closed = True
            self._link.close()
            self.examples.close()
            _release(self._lock_file)

    def status(self) -> str:
        """What the device does or waits for, in words."""
        return self._status

    # ---- the background thread -------------------------------------------------------------------------------------------

    def _say(self, status: str) -> None:
        status = "".join(c if c.isprintable() else " " for c in status)  # some of it the coordinator wrote
        if status != self._status:
            self._status = status
            log.info("%s: %s", self.name, status)
            if self._on_status is not None:
                try:
                    self._on_status(status)
                except Exception:
                    log.exception("the app's on_status callback failed")

    def _run(self) -> None:
        jitter, pause = random.Random(), BACKOFF_S[0]
        while not self._stopping.is_set():
            try:
                self._ensure_enrolled()
                wait_s = self._ask_for_work()
                pause, self._failing = BACKOFF_S[0], False
            except (Cancelled, TrainingStopped):
                wait_s = pause  # ends at once if it was stop()
            except Exception as error:
                if not isinstance(error, PocketfedError):
                    log.exception("unexpected")
                self._failing = True
                self._say(f"will try again: {error}")
                wait_s = pause * jitter.uniform(0.5, 1.0)
                pause = min(pause * 2, BACKOFF_S[1])
            self._stopping.wait(_bounded(wait_s, 0.0, LONGEST_WAIT_S))
        self._say("stopped")

    def _ensure_enrolled(self) -> None:
        with self._setup_lock:
            if not self._link.token:
                if not self._failing:
                    self._say("enrolling")
                # The token is on disk before the coordinator hears of it: a lost reply does not lock the device out.
                token = _read_json(self.home / "identity.json").get("token") or secrets.token_urlsafe(32)
                identity = {"name": self.name, "token": token, "enrolled": False}
                _write_json(self.home / "identity.json", identity)
                self._link.enrol(self.name, self.channel, token, self._enrolment_key)
                _write_json(self.home / "identity.json", identity | {"enrolled": True})

    def _ask_for_work(self) -> float:
        """One check-in and what follows from it. Returns how many seconds to wait before the next."""
        if not self._failing:
            self._say("waiting for work")
        held = self._held_release_id()
        refused, why = self._refused
        call = self._link.begin_check_in(
            self.examples.count(labelled=True),
            max(held, refused),
            0.0 if self._failing else CHECK_IN_S,
            key_list=self._trust.list_sequence,
            refused_release=refused,
            refusal=why[:500],
        )
        reply = self._link.end_check_in(call)
        if reply.HasField("keys"):
            with self._setup_lock:
                self._trust.learn_keys(reply.keys)
        if reply.HasField("release") and reply.release.id > max(held, refused):
            try:
                self._adopt(reply.release)
            except UntrustedError as error:
                self._refuse(reply.release.id, error)
            except ArtifactError as error:
                if not reply.HasField("assignment"):
                    raise
                self._say(f"keeps its model: {error}")  # the assignment may be of another
        if reply.HasField("assignment"):
            self._work(reply.assignment)
            return 0.0
        return float(reply.wait.retry_after_s)

    def _refuse(self, release_id: int, error: UntrustedError) -> None:
        """Keep the model in use. The coordinator hears of it with the next check-in, and does not offer the release again."""
        self._refused = (release_id, str(error))
        log.warning("%s: release %d is refused: %s", self.name, release_id, error)
        self._say(f"keeps its model: {error}")

    def _work(self, assignment: fleet.Assignment) -> None:
        with _Alive(self._link, assignment, self._stopping) as alive:
            try:
                reply = self._perform(assignment, alive)
            except (TrainingStopped, Cancelled) as error:
                if isinstance(error, Cancelled) and not self._stopping.is_set():
                    raise  # it was the coordinator that ended the call; the assignment is still ours
                self._say("stopped training")
                if not alive.cancelled:
                    self._decline(assignment.id, "the app stopped the device")
                return
            except Unreachable:
                raise  # the assignment is still ours: the next check-in gives it again
            except PocketfedError as error:
                self._say(f"cannot do round {assignment.round}: {error}")
                self._decline(assignment.id, type(error).__name__ + ": " + str(error))
                return
            except Exception as error:
                # Kept, it would come back with every check-in and hold up its round. The text may quote an example.
                self._decline(assignment.id, type(error).__name__)
                raise
            self._say(f"uploading round {assignment.round}")
            alive.phase = fleet.HeartbeatRequest.UPLOADING
            self._hand_in(assignment, reply)

    def _perform(self, assignment: fleet.Assignment, alive: _Alive) -> Trained:
        self._say(f"preparing round {assignment.round}")
        trainer = self._trainer(assignment.artifact_version, assignment.trainable_set, alive.go_on)
        theta = self._parameters(assignment.parameters_digest, trainer.size)
        c = assignment.config
        config = TrainConfig.from_mapping({f.name: getattr(c, f.name) for f in c.DESCRIPTOR.fields})
        examples = self._examples(trainer, config.max_length)
        kind = "evaluate" if assignment.kind == fleet.Assignment.EVALUATE else "train"
        alive.phase = fleet.HeartbeatRequest.TRAINING
        self._say(
            f"{'measuring' if kind == 'evaluate' else 'training'} in round {assignment.round} on {len(examples)} examples"
        )
        task = Task(kind, theta, config, assignment.round, self.name)  # type: ignore[arg-type]
        kept = Checkpoint(self.home / "training.safetensors")  # of the last round that was broken off, if any
        return perform(trainer, task, examples, alive.should_stop, alive.tell, kept)

    def _hand_in(self, assignment: fleet.Assignment, reply: Trained) -> None:
        data = encode_vector("delta", reply.delta) if assignment.kind == fleet.Assignment.TRAIN else b""
        digest = hashlib.sha256(data).hexdigest()
        end, pause = time.monotonic() + _bounded(assignment.deadline_s, 0.0, 86400.0), BACKOFF_S[0]
        while True:
            try:
                receipt = self._link.upload(assignment.id, data, digest, reply.num_examples, reply.metrics)
                self._say("handed in" if receipt.accepted else f"not taken: {receipt.reason}")
                return
            except (Unreachable, Cancelled, Refused) as error:
                if isinstance(error, Refused) and error.code not in RESUMABLE:
                    raise
                if time.monotonic() > end or self._stopping.wait(pause):
                    raise
                pause = min(pause * 2, 5.0)

    def _decline(self, assignment_id: str, reason: str) -> None:
        try:
            self._link.decline(assignment_id, reason)
        except PocketfedError as error:
            log.info("%s: could not decline: %s", self.name, error)

    # ---- models ----------------------------------------------------------------------------------------------------------

    def _trainer(
        self,
        version: str,
        trainable_set: str,
        progress: Callable[[float], None] = lambda fraction: None,
        release: bool = False,
    ) -> PlanTrainer:
        key = (version, trainable_set)
        with self._setup_lock:
            source: Source = self._link
            if self._trust.publisher or key not in self._trainers:
                source = self._vouched(version, release)
            if key not in self._trainers:
                artifact, _ = fetch(source, version, self.home / "artifacts", progress)
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
                self._trust.check(version, self.channel, release)
                return self._link
        except UntrustedError as error:
            log.debug("%s: asks again, the publisher may have more to say: %s", self.name, error)
        reply = self._link.describe(version)
        if reply.HasField("keys"):
            self._trust.learn_keys(reply.keys)
        if reply.HasField("signed") and self._trust.publisher:
            self._trust.learn_version(version, self.channel, reply.signed)
        self._trust.check(version, self.channel, release)
        return _Described(self._link, bytes(reply.manifest))

    def _parameters(self, digest: str, size: int) -> Vector:
        return _checked_vector(self._download(digest, size), digest, size)

    def _download(self, digest: str, size: int) -> bytes:
        """Parameters' bytes, as they come; no more than `size` float32 values can have."""
        data = bytearray()
        for chunk in self._link.download(digest):
            data += chunk
            if len(data) > vector_bytes(size):
                raise ArtifactError(f"parameters {digest[:12]} have more bytes than {size} values; they are not used")
        return bytes(data)

    def _examples(self, trainer: PlanTrainer, max_length: int) -> Examples:
        """The labelled examples, tokenized once for as long as neither they nor the model change."""
        key = (self.examples.state(), trainer.artifact.manifest.version, max_length)
        if self._encoded is None or self._encoded[0] != key:
            index = {label: i for i, label in enumerate(trainer.artifact.manifest.labels)}
            usable = [e for e in self.examples.labelled() if e.label in index]
            rows = trainer.encode([e.text for e in usable], [e.text_pair for e in usable], max_length) if usable else ()
            labels = np.array([index[e.label] for e in usable if e.label is not None], np.int64)
            self._encoded = (key, Examples(rows, labels, truncated=getattr(rows, "truncated", 0)))
        return self._encoded[1]

    def _go_on(self, _fraction: float) -> None:
        """`stop()` waits for the background thread, not for what it downloads; predict() may always fetch a model."""
        if self._stopping.is_set() and threading.current_thread() is self._thread:
            raise TrainingStopped("the app stopped the device; the download goes on where it was")

    def _held_release_id(self) -> int:
        return int(_read_json(self.home / "release.json").get("id", 0))

    def _adopt(self, release: Any) -> None:
        """Make a release the model in use: everything is on disk and checked before it is."""
        with self._setup_lock:
            self._say("fetching a new model")
            trainer = self._trainer(release.artifact_version, release.trainable_set, self._go_on, release=True)
            data = self._download(release.parameters_digest, trainer.size)
            theta = _checked_vector(data, release.parameters_digest, trainer.size)
            _write_bytes(self._theta_file(release.parameters_digest), data)
            held = {
                "id": release.id,
                "artifact": release.artifact_version,
                "set": release.trainable_set,
                "digest": release.parameters_digest,
            }
            self._trust.adopt(release.artifact_version, self.channel)
            _write_json(self.home / "release.json", held)  # from here on it is the model in use
            with self._model_lock:
                self._model = Model(trainer, theta, release.id)
            self._forget_others(release.artifact_version, self._theta_file(release.parameters_digest))

    def _theta_file(self, digest: str) -> Path:
        return self.home / f"theta-{digest[:16]}.safetensors"

    def _forget_others(self, version: str, theta_file: Path) -> None:
        """Delete artifacts and parameters that nothing on the device uses any more."""
        used = {version, *(held for held, _ in self._trainers)}
        self._trust.forget(used)
        for folder in (self.home / "artifacts").iterdir():
            if folder.name.removesuffix(".partial") not in used:
                shutil.rmtree(folder, ignore_errors=True)
        for file in self.home.glob("theta-*.safetensors"):
            if file != theta_file:
                file.unlink()

    def _current_model(self) -> Model:
        with self._model_lock:
            model = self._model or self._model_on_disk()
            self._model = model
        if model is None:
            with self._setup_lock:
                self.enrol()
                if self._model is None:  # the background thread may have fetched one meanwhile
                    self._adopt(self._link.latest(self.channel).release)
                model = self._model
        assert model is not None
        return model

    def _model_on_disk(self) -> Model | None:
        held = _read_json(self.home / "release.json")
        try:
            artifact: Artifact = open_artifact(self.home / "artifacts" / held["artifact"], held["artifact"])
            trainer = PlanTrainer(artifact, held["set"], self._threads, max_memory_mb=self._max_memory_mb)
            theta = _checked_vector(self._theta_file(held["digest"]).read_bytes(), held["digest"], trainer.size)
        except (KeyError, OSError, ArtifactError):
            return None
        return Model(trainer, theta, int(held["id"]))


@dataclass(frozen=True)
class _Described:
    """A Source whose manifest has come already."""

    link: Link
    data: bytes

    def manifest(self, version: str) -> bytes:
        return self.data

    def download(self, digest: str, first_chunk: int) -> Iterator[bytes]:
        return self.link.download(digest, first_chunk)


class _Alive:
    """Sends heartbeats for an assignment while the device works on it, and hears when to stop."""

    def __init__(self, link: Link, assignment: fleet.Assignment, stopping: threading.Event) -> None:
        self.phase = fleet.HeartbeatRequest.DOWNLOADING
        self.cancelled = False
        self._link, self._assignment, self._stopping = link, assignment, stopping
        self._progress = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pocketfed-heartbeat", daemon=True)

    def __enter__(self) -> _Alive:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def tell(self, progress: float) -> None:
        self._progress = progress

    def go_on(self, progress: float) -> None:
        """As `tell`, for what has no `should_stop` of its own."""
        self.tell(progress)
        if self.should_stop():
            raise TrainingStopped("stopped while the model was fetched; the download goes on where it was")

    def should_stop(self) -> bool:
        return self.cancelled or self._stopping.is_set()

    def _beat(self) -> None:
        while not self._done.wait(_bounded(self._assignment.lease_s / 3, SHORTEST_BEAT_S, LONGEST_WAIT_S)):
            try:
                if not self._link.heartbeat(self._assignment.id, self.phase, self._progress):
                    self.cancelled = True
                    return
            except (Unreachable, Cancelled):
                continue  # the lease decides
            except PocketfedError as error:
                log.info("heartbeat refused: %s", error)
                self.cancelled = True
                return


def _bounded(seconds: float, low: float, high: float) -> float:
    """What a coordinator says, as a time that can be waited for; `low` for NaN."""
    return min(high, max(low, seconds))


def _checked_vector(data: bytes, digest: str, size: int) -> Vector:
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(f"parameters do not have the digest {digest[:12]} that they should; they are not used")
    try:
        return decode_vector("theta", data, size)
    except ParametersError as error:
        raise ArtifactError(f"parameters {digest[:12]}: {error}") from None


def _claim(home: Path) -> Any:
    """Make home and hold its lock, so that one process at a time works in it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        stream = (home / "lock").open("a+b")
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {home}: {error.strerror}; give a folder that this app may write to"
        ) from None
    try:
        import fcntl
    except ImportError:  # Windows: no advisory lock
        return stream
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise ConfigurationError(
            f"{home} is in use by another device; stop it, or give each device a home of its own"
        ) from None
    return stream


def _release(stream: Any) -> None:
    stream.close()


def _read_json(path: Path) -> dict[str, Any]:
    """What `_write_json` wrote; empty where there is nothing readable."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_bytes(path, json.dumps(value).encode())


def _write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all; readable by this user only."""
    partial = path.with_name(path.name + ".partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
