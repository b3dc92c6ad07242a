"""Taking part: the background thread that asks for work, does it, and hands in what came of it."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.unknown_fields import UnknownFieldSet

from pocketfed.client_sdk.alive import LONGEST_WAIT_S, Alive, bounded
from pocketfed.client_sdk.checkpoint import Checkpoint
from pocketfed.client_sdk.consent import Consent, RunDescription
from pocketfed.client_sdk.errors import (
    ArtifactError,
    ConfigurationError,
    PocketfedError,
    TrainingStopped,
    UntrustedError,
)
from pocketfed.client_sdk.examples import ExampleStore
from pocketfed.client_sdk.identity import Identity
from pocketfed.client_sdk.keeping import Keeping, Part
from pocketfed.client_sdk.link import Cancelled, Link, Refused, Unreachable, log
from pocketfed.client_sdk.models import Models
from pocketfed.client_sdk.outgoing import UpdateForm
from pocketfed.client_sdk.perform import Reply, Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig
from pocketfed.client_sdk.trust import Trust
from pocketfed.protos import fleet_pb2 as fleet

CHECK_IN_S = 20.0  # how long a long poll stays open
BACKOFF_S = (0.2, 30.0)  # shortest and longest pause after a failure
RESUMABLE = ("OUT_OF_RANGE", "DATA_LOSS")  # an upload's refusals after which to ask where it stands and go on


class Participation:
    """A device's part in rounds. `run` is the body of its background thread; it ends soon after `stopping` is set.

    Args:
        keeping: what stays of a run on the device.
        consent: whether the app lets it take part.
        lock: held while enrolling, fetching and learning keys.
        say: told, in words, what the device does or waits for.
    """

    def __init__(
        self,
        home: Path,
        identity: Identity,
        link: Link,
        trust: Trust,
        models: Models,
        examples: ExampleStore,
        keeping: Keeping,
        consent: Consent,
        lock: threading.RLock,
        say: Callable[[str], None],
    ) -> None:
        self._home, self._identity, self._link, self._trust = home, identity, link, trust
        self._models, self._examples, self._lock, self._say = models, examples, lock, say
        self._keeping, self._consent = keeping, consent
        self.stopping = threading.Event()
        self.failing = False  # the last attempt to talk to the coordinator failed
        self._refused: tuple[int, str] = (0, "")  # a release that is not taken, and why
        self._encoded: tuple[Any, Examples] | None = None

    def run(self) -> None:
        jitter, pause = random.Random(), BACKOFF_S[0]
        while not self.stopping.is_set():
            try:
                self.ensure_enrolled()
                wait_s = self.ask_for_work()
                pause, self.failing = BACKOFF_S[0], False
            except (Cancelled, TrainingStopped):
                wait_s = pause  # ends at once if it was stop()
            except Exception as error:
                if not isinstance(error, PocketfedError):
                    log.exception("unexpected")
                self.failing = True
                self._say(f"will try again: {error}")
                wait_s = pause * jitter.uniform(0.5, 1.0)
                pause = min(pause * 2, BACKOFF_S[1])
            self.stopping.wait(bounded(wait_s, 0.0, LONGEST_WAIT_S))
        self._say("stopped")

    def ensure_enrolled(self) -> None:
        self._identity.ensure_enrolled(self._link, lambda status: None if self.failing else self._say(status))

    def ask_for_work(self) -> float:
        """One check-in and what follows from it. Returns how many seconds to wait before the next."""
        if not self.failing:
            self._say("waiting for work")
        held = self._models.held_release_id()
        refused, why = self._refused
        call = self._link.begin_check_in(
            self._examples.count(labelled=True),
            max(held, refused),
            0.0 if self.failing else CHECK_IN_S,
            key_list=self._trust.list_sequence,
            refused_release=refused,
            refusal=why[:500],
        )
        reply = self._link.end_check_in(call)
        if reply.HasField("keys"):
            with self._lock:
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

    def _adopt(self, release: Any) -> None:
        self._say("fetching a new model")
        self._models.adopt(release, self._go_on)

    def _go_on(self, _fraction: float) -> None:
        if self.stopping.is_set():
            raise TrainingStopped("the app stopped the device; the download goes on where it was")

    def _refuse(self, release_id: int, error: UntrustedError) -> None:
        """Keep the model in use. The coordinator hears of it with the next check-in, and does not offer the release again."""
        self._refused = (release_id, str(error))
        log.warning("%s: release %d is refused: %s", self._identity.name, release_id, error)
        self._say(f"keeps its model: {error}")

    def _work(self, assignment: fleet.Assignment) -> None:
        with Alive(self._link, assignment, self.stopping) as alive:
            try:
                reply = self._perform(assignment, alive)
            except (TrainingStopped, Cancelled) as error:
                if isinstance(error, Cancelled) and not self.stopping.is_set():
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

    def _perform(self, assignment: fleet.Assignment, alive: Alive) -> Reply:
        self._say(f"preparing round {assignment.round}")
        form = _form(assignment)
        described = RunDescription(assignment.run, assignment.artifact_version, assignment.trainable_set, form)
        self._consent.require(described)
        trainer = self._models.trainer(assignment.artifact_version, assignment.trainable_set, alive.go_on)
        theta = self._models.parameters(assignment.parameters_digest, trainer.size)
        c = assignment.config
        config = TrainConfig.from_mapping({f.name: getattr(c, f.name) for f in c.DESCRIPTOR.fields})
        examples = self._local(trainer, config.max_length)
        kind = "evaluate" if assignment.kind == fleet.Assignment.EVALUATE else "train"
        alive.phase = fleet.HeartbeatRequest.TRAINING
        self._say(
            f"{'measuring' if kind == 'evaluate' else 'training'} in round {assignment.round} on {len(examples)} examples"
        )
        part = Part(assignment.id, assignment.parameters_digest, assignment.run, form, theta)
        made = self._keeping.reply(part) if kind == "train" else None
        if made is not None:
            return made
        kept = self._keeping.before(trainer, part)
        task = Task(kind, theta, config, assignment.round, self._identity.name, form)  # type: ignore[arg-type]
        broken_off = Checkpoint(self._home / "training.safetensors")  # of the last round that was, if any
        reply = perform(trainer, task, examples, alive.should_stop, alive.tell, broken_off, kept)
        if kind == "train":
            self._keeping.hold(trainer, part, reply)
        return reply

    def _local(self, trainer: PlanTrainer, max_length: int) -> Examples:
        """The labelled examples, tokenized once for as long as neither they nor the model change."""
        key = (self._examples.state(), trainer.artifact.manifest.version, max_length)
        if self._encoded is None or self._encoded[0] != key:
            index = {label: i for i, label in enumerate(trainer.artifact.manifest.labels)}
            usable = [e for e in self._examples.labelled() if e.label in index]
            rows = trainer.encode([e.text for e in usable], [e.text_pair for e in usable], max_length) if usable else ()
            labels = np.array([index[e.label] for e in usable if e.label is not None], np.int64)
            self._encoded = (key, Examples(rows, labels, truncated=getattr(rows, "truncated", 0)))
        return self._encoded[1]

    def _hand_in(self, assignment: fleet.Assignment, reply: Reply) -> None:
        digest = hashlib.sha256(reply.data).hexdigest()
        end, pause = time.monotonic() + bounded(assignment.deadline_s, 0.0, 86400.0), BACKOFF_S[0]
        while True:
            try:
                receipt = self._link.upload(assignment.id, reply.data, digest, reply.num_examples, reply.metrics)
                self._keeping.settle(assignment.id, receipt.accepted)
                self._models.refresh()
                self._say("handed in" if receipt.accepted else f"not taken: {receipt.reason}")
                return
            except (Unreachable, Cancelled, Refused) as error:
                if isinstance(error, Refused) and error.code not in RESUMABLE:
                    raise
                if time.monotonic() > end or self.stopping.wait(pause):
                    raise
                pause = min(pause * 2, 5.0)

    def _decline(self, assignment_id: str, reason: str) -> None:
        try:
            self._link.decline(assignment_id, reason)
        except PocketfedError as error:
            log.info("%s: could not decline: %s", self._identity.name, error)


def _form(assignment: fleet.Assignment) -> UpdateForm:
    """
    Raises:
        ConfigurationError: a form that this version does not know: a newer one, or one that cannot be.
    """
    if not assignment.HasField("form"):
        return UpdateForm()
    form = assignment.form
    if len(UnknownFieldSet(form)):
        raise ConfigurationError("the run asks for a form that this version does not know; update the app")
    return UpdateForm.from_mapping({f.name: getattr(form, f.name) for f in form.DESCRIPTOR.fields})
