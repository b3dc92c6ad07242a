"""Taking part: the background thread that asks for work, does it, and hands in what came of it."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from pocketfed.client_sdk.alive import LONGEST_WAIT_S, Alive, bounded
from pocketfed.client_sdk.checkpoint import Checkpoint
from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.conditions import Unmet
from pocketfed.client_sdk.consent import Consent, RunDescription
from pocketfed.client_sdk.errors import (
    ArtifactError,
    ConfigurationError,
    NoExamples,
    PocketfedError,
    StorageError,
    TrainingDiverged,
    TrainingStopped,
    UnsupportedError,
    UntrustedError,
)
from pocketfed.client_sdk.home import writing
from pocketfed.client_sdk.identity import Identity
from pocketfed.client_sdk.judging import judge
from pocketfed.client_sdk.keeping import Keeping, Part
from pocketfed.client_sdk.link import Cancelled, Link, Paused, Refused, Unreachable, log
from pocketfed.client_sdk.local import LocalExamples
from pocketfed.client_sdk.models import Models
from pocketfed.client_sdk.outbox import Outbox, Update
from pocketfed.client_sdk.outgoing import UpdateForm
from pocketfed.client_sdk.perform import Kind, Reply, Task, perform
from pocketfed.client_sdk.status import Voice
from pocketfed.client_sdk.trainer import TrainConfig
from pocketfed.client_sdk.trust import Trust
from pocketfed.client_sdk.usage import Usage
from pocketfed.client_sdk.watch import Watch
from pocketfed.protos import fleet_pb2 as fleet

BACKOFF_S = (0.2, 30.0)  # shortest and longest pause after a failure
LOOK_S = 10.0  # how often a device that may not work looks whether it may
NEWS_S = 900.0  # how often one that may not train asks for releases
OF_THE_DEVICE = (
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "FAILED_PRECONDITION",
)  # refusals that say nothing of the update
RESUMABLE = ("OUT_OF_RANGE", "DATA_LOSS")  # an upload's refusals after which to ask where it stands and go on
KINDS: dict[int, Kind] = {fleet.Assignment.TRAIN: "train", fleet.Assignment.EVALUATE: "evaluate"}
# What a decline begins with where it is not an error's name: words that an operator counts.
CODES: dict[type[Exception], str] = {TrainingDiverged: "LOCAL_FAILED_COMPUTE", NoExamples: "NOT_ELIGIBLE"}


@dataclass(frozen=True)
class Parts:
    """What a device is made of, shared by its face and its background thread. lock: for enrolling, fetching, learning keys."""

    home: Path
    identity: Identity
    link: Link
    trust: Trust
    models: Models
    local: LocalExamples
    watch: Watch
    usage: Usage
    voice: Voice
    clock: Clock
    lock: threading.RLock
    keeping: Keeping
    consent: Consent
    tier: str


class Participation:
    """A device's part in rounds. `run` is the body of its background thread; it ends soon after `stop`.

    Args:
        fallback_margin: how much less accuracy on the held-out examples a new release may have than the one before.
        checkpoint_s: how often training is written down while it goes on.
    """

    def __init__(self, parts: Parts, fallback_margin: float, checkpoint_s: float) -> None:
        self._link, self._models, self._local, self._watch = parts.link, parts.models, parts.local, parts.watch
        self._identity, self._trust, self._lock = parts.identity, parts.trust, parts.lock
        self._usage, self._voice, self._clock, self._home = parts.usage, parts.voice, parts.clock, parts.home
        self._say = parts.voice.say
        self._outbox = Outbox(parts.home / "update.kept")
        self._keeping, self._consent, self._tier = parts.keeping, parts.consent, parts.tier
        self._fallback_margin, self._checkpoint_s = fallback_margin, checkpoint_s
        self.stopping = threading.Event()
        self._woken = threading.Event()  # by stop(), or by the app that says that something has changed
        self.failing = False  # the last attempt to talk to the coordinator failed
        self._refused: tuple[int, str] = (0, "")  # a release that is not taken, and why
        self._too_few: tuple[int, int, int] | None = None  # release and examples that gave nothing to judge by
        self._next_news = float("-inf")

    def stop(self) -> None:
        self.stopping.set()
        self._woken.set()

    def reconsider(self) -> None:
        self._watch.forget_reading()
        self._woken.set()

    def run(self) -> None:
        jitter, pause = random.Random(), BACKOFF_S[0]
        while not self.stopping.is_set():
            try:
                with writing(self._home):
                    wait_s = self.turn()
                pause, self.failing = BACKOFF_S[0], False
            except (Cancelled, TrainingStopped):
                wait_s = pause  # ends at once if it was stop()
            except Exception as error:
                if not isinstance(error, PocketfedError):
                    log.exception("unexpected")
                self.failing = True
                self._say(f"will try again: {error}", error=True)
                wait_s = pause * jitter.uniform(0.5, 1.0)
                pause = min(pause * 2, BACKOFF_S[1])
            self._voice.tell(None)
            self._rest(bounded(wait_s, 0.0, LONGEST_WAIT_S))
        self._usage.save()
        self._say("stopped")

    def _rest(self, seconds: float) -> None:
        self._clock.wait(self._woken, seconds)
        if not self.stopping.is_set():
            self._woken.clear()

    def turn(self) -> float:
        """What is to be done now. Returns how many seconds to wait before the next turn."""
        kept = self._outbox.read()
        if kept is not None:  # by a process that was killed, or stopped, before it could hand it in
            with self._alive(kept[0]) as alive:
                self._hand_in(*kept, alive)
            return 0.0
        missing = self._watch.look()
        if missing.all:
            return self._do_without(missing)
        self.ensure_enrolled()
        return self.ask_for_work()

    def _do_without(self, missing: Unmet) -> float:
        """A device that may not work asks for none; it hears of new models as long as the network may be used."""
        if not missing.transfer and self._clock.passed() >= self._next_news:
            self.ensure_enrolled()
            reply = self._check_in(0, 0.0)
            self._next_news = self._clock.passed() + NEWS_S
            if reply.HasField("assignment"):  # of before the process was started anew
                self._decline_for(reply.assignment, missing)
        if not missing.compute:
            self.judge()
        missing = self._watch.look()
        if not missing.all:
            return 0.0
        self._voice.wait_for(missing.all.values())
        return LOOK_S

    def ensure_enrolled(self) -> None:
        self._identity.ensure_enrolled(self._link, lambda status: None if self.failing else self._say(status))

    # ---- asking ----------------------------------------------------------------------------------------------------------

    def ask_for_work(self) -> float:
        """One check-in and what follows from it. Returns how many seconds to wait before the next."""
        if not self.failing:
            self.judge()
        examples, missing = self._local.eligible(self._models.labels())
        if not self.failing:
            self._say(f"waiting for work; not eligible: {missing}" if missing else "waiting for work")
        reply = self._check_in(examples, 0.0 if self.failing else self._clock.poll_s)
        if reply.HasField("assignment"):
            self._work(reply.assignment)
            return 0.0
        return float(reply.wait.retry_after_s)

    def _check_in(self, examples: int, wait_s: float) -> fleet.CheckInReply:
        """Ask, and take what is new: keys and a release."""
        shelf, held = self._models.shelf, self._models.held_release_id()
        report = shelf.report if shelf is not None else {}
        refused, why = self._refused
        call = self._link.begin_check_in(
            examples,
            max(held, refused),
            wait_s,
            key_list=self._trust.list_sequence,
            refused_release=refused,
            refusal=why[:500],
            report=fleet.ReleaseReport(**report) if report else None,
            tier=self._tier,
        )
        reply = self._link.end_check_in(call)
        if report:
            self._models.reported()
        if reply.HasField("keys"):
            with self._lock:
                self._trust.learn_keys(reply.keys)
        if reply.HasField("release") and reply.release.id > max(held, refused):
            try:
                self._adopt(reply.release)
            except (UntrustedError, UnsupportedError) as error:
                self._refuse(reply.release.id, error)
            except (ArtifactError, StorageError) as error:
                if not reply.HasField("assignment"):
                    raise
                self._say(f"keeps its model: {error}", error=True)  # the assignment may be of another
        return reply

    def _adopt(self, release: Any) -> None:
        self._say("fetching a new model")
        self._models.adopt(release, self._go_on)

    def _go_on(self, _fraction: float) -> None:
        if self.stopping.is_set() or not self._watch.may_transfer():
            raise TrainingStopped("the download was interrupted; it goes on where it was")

    def _refuse(self, release_id: int, error: ArtifactError) -> None:
        """Keep the model in use. The coordinator hears of it with the next check-in, and does not offer the release again."""
        self._refused = (release_id, str(error))
        log.warning("%s: release %d is refused: %s", self._identity.name, release_id, error)
        self._say(f"keeps its model: {error}", error=True)

    def judge(self) -> None:
        """As `judging.judge`; where it had too few examples, not again before something has changed."""
        state = (self._models.held_release_id(), self._local.count(), self._local.count_held_out())
        should_stop = lambda: self.stopping.is_set() or not self._watch.may_compute()  # noqa: E731
        if state != self._too_few and not judge(
            self._models, self._local, self._fallback_margin, should_stop, self._say
        ):
            self._too_few = state

    # ---- working ---------------------------------------------------------------------------------------------------------

    def _alive(self, assignment: fleet.Assignment) -> Alive:
        watch = self._watch
        return Alive(self._link, assignment, self.stopping, watch.may_compute, watch.may_transfer, self._voice.tell)

    def _work(self, assignment: fleet.Assignment) -> None:
        missing = self._watch.look()
        if missing.all:  # lost while the device waited for work: nothing is begun
            self._decline_for(assignment, missing)
            return
        with self._alive(assignment) as alive:
            reply = self._compute(assignment, alive)
            if reply is not None:
                update = Update(reply.data, reply.num_examples, reply.metrics)
                self._outbox.keep(assignment, update)
                self._usage.end_round()
                self._hand_in(assignment, update, alive)

    def _compute(self, assignment: fleet.Assignment, alive: Alive) -> Reply | None:
        """What the assignment asks for; None where it was given back, or has ended."""
        while True:
            try:
                return self._perform(assignment, alive)
            except (TrainingStopped, Cancelled) as error:
                if isinstance(error, Cancelled) and not self.stopping.is_set():
                    raise  # it was the coordinator that ended the call; the assignment is still ours
                if not self._comes_back(assignment, alive):
                    return None
            except Unreachable:
                raise  # the assignment is still ours: the next check-in gives it again
            except PocketfedError as error:
                self._say(f"cannot do round {assignment.round}: {error}", error=True)
                self._decline(assignment.id, f"{CODES.get(type(error), type(error).__name__)}: {error}")
                return None
            except Exception as error:
                # Kept, it would come back with every check-in and hold up its round. The text may quote an example.
                self._decline(assignment.id, type(error).__name__)
                raise

    def _comes_back(self, assignment: fleet.Assignment, alive: Alive) -> bool:
        """Training or a download was broken off. Wait for the condition that was lost, as long as patience lasts."""
        end = self._clock.passed() + self._watch.asked.patience_s
        while not alive.ended():
            missing = self._watch.look()
            fetching = alive.phase == fleet.HeartbeatRequest.DOWNLOADING
            if not (missing.compute or (fetching and missing.transfer)):
                return True
            if self._clock.passed() >= end:
                self._decline_for(assignment, missing)
                return False
            self._voice.wait_for(missing.all.values(), f"round {assignment.round} is broken off")
            self._rest(1.0)
        self._say("stopped training")
        if not alive.cancelled:
            self._decline(assignment.id, "the app stopped the device")
        return False

    def _perform(self, assignment: fleet.Assignment, alive: Alive) -> Reply:
        kind = KINDS.get(assignment.kind)
        if kind is None:
            raise UnsupportedError(f"an assignment of kind {assignment.kind} is not known to this SDK: update the app")
        self._say(f"preparing round {assignment.round}")
        form = _form(assignment)
        described = RunDescription(assignment.run, assignment.artifact_version, assignment.trainable_set, form)
        self._consent.require(described)
        alive.phase = fleet.HeartbeatRequest.DOWNLOADING
        trainer = self._models.trainer(assignment.artifact_version, assignment.trainable_set, alive.go_on)
        theta, control = self._models.start(assignment.parameters_digest, trainer.size, alive.go_on)
        c = assignment.config
        config = TrainConfig.from_mapping({f.name: getattr(c, f.name) for f in c.DESCRIPTOR.fields})
        examples = self._local.training(trainer, config.max_length)
        alive.phase = fleet.HeartbeatRequest.TRAINING
        self._say(
            f"{'measuring' if kind == 'evaluate' else 'training'} in round {assignment.round} on {len(examples)} examples"
        )
        part = Part(assignment.id, assignment.parameters_digest, assignment.run, form, theta, control is not None)
        made = self._keeping.reply(part) if kind == "train" else None
        if made is not None:
            return made
        kept = self._keeping.before(trainer, part)
        task = Task(kind, theta, config, assignment.round, self._identity.name, form, control=control)
        # Of the last round that was, if any.
        broken_off = Checkpoint(self._home / "training.safetensors", self._checkpoint_s)
        reply = perform(trainer, task, examples, alive.should_stop, alive.tell, broken_off, kept)
        if kind == "train":
            with writing(self._home):
                self._keeping.hold(trainer, part, reply)
        return reply

    # ---- handing in ------------------------------------------------------------------------------------------------------

    def _hand_in(self, assignment: fleet.Assignment, update: Update, alive: Alive) -> None:
        """Send it as soon as the network may be used, until it has arrived or nobody waits for it any more."""
        alive.phase = fleet.HeartbeatRequest.UPLOADING
        end, pause = self._clock.passed() + bounded(assignment.deadline_s, 0.0, 86400.0), BACKOFF_S[0]
        while not alive.cancelled:
            missing = self._watch.look().transfer
            if missing:
                self._voice.wait_for(missing.values(), f"the update of round {assignment.round} is kept")
            else:
                self._say(f"uploading round {assignment.round}")
                try:
                    receipt = self._link.upload(
                        assignment.id,
                        update.data,
                        update.digest,
                        update.num_examples,
                        update.metrics,
                        alive.may_transfer,
                        alive.tell,
                    )
                except (Unreachable, Cancelled, Paused, Refused) as error:
                    if isinstance(error, Refused) and error.code in OF_THE_DEVICE:
                        raise  # the update may still be wanted once the device is let in again
                    if isinstance(error, Refused) and error.code not in RESUMABLE:
                        self._outbox.clear()
                        self._decline(
                            assignment.id, f"{error.code}: {error}"
                        )  # else it would be made and refused again
                        raise
                    if self._clock.passed() > end:
                        self._outbox.clear()
                        raise
                else:
                    try:
                        self._keeping.settle(assignment.id, receipt.accepted)
                    except OSError as error:  # asked for again before the next round
                        log.warning(
                            "%s: what stays of round %d could not be kept: %s",
                            self._identity.name,
                            assignment.round,
                            error,
                        )
                    self._outbox.clear()
                    self._models.refresh()
                    alive.tell(1.0)
                    self._say("handed in" if receipt.accepted else f"not taken: {receipt.reason}")
                    return
            if self.stopping.is_set():
                raise TrainingStopped("the app stopped the device; its update is handed in when it is started again")
            self._rest(1.0 if missing else pause)
            pause = min(pause * 2, 5.0)
        self._outbox.clear()
        self._say(f"round {assignment.round} has ended")

    def _decline_for(self, assignment: fleet.Assignment, missing: Unmet) -> None:
        """Which conditions are missing is told, what the sensors say is not."""
        self._voice.wait_for(missing.all.values(), f"gave round {assignment.round} back")
        self._decline(assignment.id, f"NOT_ELIGIBLE: {', '.join(missing.all)}")

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
