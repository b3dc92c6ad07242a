"""The class an app holds: examples in, predictions out, and a background thread that takes part in rounds.

device = Device("127.0.0.1:8765", home="~/.my-app/pocketfed")
device.add_examples([("play some jazz", "play_music")])
device.start()
device.predict("put on a record").label
device.stop()
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.conditions import MB, Conditions, Readings
from pocketfed.client_sdk.consent import Accept, Consent
from pocketfed.client_sdk.errors import ConfigurationError, LinkError, StorageError
from pocketfed.client_sdk.examples import Added, ExampleStore
from pocketfed.client_sdk.forks import refuse_after_fork, remember
from pocketfed.client_sdk.home import check_room, claim, release, writing
from pocketfed.client_sdk.identity import Identity
from pocketfed.client_sdk.keeping import Keeping
from pocketfed.client_sdk.link import Link, is_loopback
from pocketfed.client_sdk.local import LocalExamples, check_holdout
from pocketfed.client_sdk.models import Model, Models
from pocketfed.client_sdk.participation import Participation, Parts
from pocketfed.client_sdk.status import Progress, State, Voice
from pocketfed.client_sdk.trainer import pad
from pocketfed.client_sdk.trust import Trust
from pocketfed.client_sdk.usage import Usage
from pocketfed.client_sdk.watch import Watch, home_bytes


@dataclass(frozen=True)
class Prediction:
    """probability: of the label, 0 to 1; probabilities: of all labels; example_id: the text's, 0 where it was not kept."""

    label: str
    probability: float
    probabilities: dict[str, float]
    example_id: int = 0


class Device:
    """One device of a fleet. Works from several threads; `start()` and `stop()` may be called more than once.

    After a fork the child has to make a Device of its own; see docs/sdk.md.

    Args:
        coordinator: HOST:PORT.
        home: a folder for this device alone; everything the SDK writes lies in it.
        name: unique in the fleet, kept in home; by default a random one.
        channel: whose releases to follow.
        tier: a word for what kind of device this is ("low", "high"); the coordinator counts devices by it. By default nothing is told.
        enrolment_key: where the coordinator asks for one.
        conditions: when it may train and transfer; by default always.
        readings: tells what the sensors say, asked at most once a second, from the background thread; by default we look.
        ca: a PEM file with the authority that signed the coordinator's certificate; by default the system's are asked.
        publisher: the root key (64 hex digits) whose artifacts to run; by default the first that is met is pinned.
        allow_plaintext_off_loopback: no TLS to another machine.
        threads: for ONNX Runtime; with 1 an update is bit-reproducible.
        max_memory_mb: the process stays below it while it computes, or says what it would need; 0: no limit.
        examples_key: 32 bytes that the app keeps in a safe place; the examples are encrypted with it.
        max_examples: so many are kept, the oldest go first; by default all.
        max_age_days: older examples go; by default none do.
        holdout: share of the examples that is never trained on: a new model is judged by them, if there are at least 8.
        fallback_margin: how much less accuracy on those a new model may have before the device goes back to the one before.
        checkpoint_s: how often training is written down while it goes on; a stop always does.
        accept: given what a run declares before anything is fetched for it; True to take part, False or a reason not to.
            Asked once a run, from the background thread. By default every run is accepted.
        on_status: told, in words, whenever `status()` changes; may be called from the background thread.
        on_progress: told how far a round is, at most ten times a second.
        clock: what time it is; for tests.

    Raises:
        ConfigurationError: an address without port, a home that cannot be written, or one used by another process;
            a key that is not the one of the examples there.
    """

    def __init__(
        self,
        coordinator: str,
        home: str | os.PathLike[str],
        *,
        name: str | None = None,
        channel: str = "stable",
        tier: str = "",
        enrolment_key: str = "",
        conditions: Conditions | None = None,
        readings: Callable[[], Readings] | None = None,
        ca: str | os.PathLike[str] | None = None,
        publisher: str = "",
        allow_plaintext_off_loopback: bool = False,
        threads: int = 1,
        max_memory_mb: float = 0.0,
        examples_key: bytes | None = None,
        max_examples: int | None = None,
        max_age_days: float | None = None,
        holdout: float = 0.2,
        fallback_margin: float = 0.1,
        checkpoint_s: float = 30.0,
        accept: Accept | None = None,
        on_status: Callable[[str], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_holdout(holdout)
        if len(tier) > 50 or not tier.isprintable():
            raise ConfigurationError(f"tier is {tier[:60]!r}; give at most 50 printable characters, or none")
        refuse_after_fork()
        clock, asked = clock or Clock(), conditions or Conditions()
        self.home = Path(home).expanduser()
        self._setup = threading.RLock()  # predict() and the background thread enrol and fetch one after the other
        self._lock_file = claim(self.home)
        try:
            identity = Identity(self.home, name, channel, enrolment_key, self._setup)
            usage = Usage(self.home / "usage.json", clock)
            self._link = Link(coordinator, identity.token, ca, allow_plaintext_off_loopback, usage.add)
            # What lies on this machine's own disk may be unsigned: a simulation's, or a first try.
            own_machine = is_loopback(coordinator.rpartition(":")[0])
            self._trust = Trust(self.home / "trust.json", publisher, unsigned=own_machine)
            self.examples = ExampleStore(self.home / "examples.db", examples_key, max_examples, max_age_days, clock)
        except BaseException:
            release(self._lock_file)
            raise
        self.name, self.channel = identity.name, channel
        keeping = self._keeping = Keeping(self.home, self._link.taken)
        self._models = Models(
            self.home,
            channel,
            self._link,
            self._trust,
            keeping,
            self._setup,
            threads,
            max_memory_mb,
            lambda count: check_room(self.home, count, home_bytes(self.home), asked.max_disk_mb * MB),
        )
        self._local = LocalExamples(self.examples, holdout)
        self._watch = Watch(asked, readings, usage, self.home, clock)
        self._voice, self._usage = Voice(self.name, on_status, on_progress), usage
        parts = Parts(
            self.home, identity, self._link, self._trust, self._models, self._local, self._watch, usage, self._voice,
            clock, self._setup, keeping, Consent(self.home, accept), tier,
        )  # fmt: skip
        self._participation = Participation(parts, fallback_margin, checkpoint_s)
        self._thread: threading.Thread | None = None
        self._lifecycle = threading.Lock()
        self._closed = self._forked = False
        remember(self)

    # ---- for the app -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_examples(self, examples: Iterable[tuple[str, str | None] | tuple[str, str | None, str | None]]) -> Added:
        """Keep (text, label) or (text, label, second text) on this device. Unusable ones are skipped and counted.

        The label is None where it is not known yet; `correct` gives it later, by the id that this returns.

        Raises:
            ConfigurationError: a text instead of a list of examples, or the device was closed.
        """
        self._require_open()
        return self.examples.add(examples)

    def correct(self, example_id: int, label: str | None) -> bool:
        """What the user says an example's label is (None: unknown). False if it is not there, or the label cannot be one."""
        self._require_open()
        return self.examples.correct(example_id, label)

    def forget(self, example_id: int | None = None) -> int:
        """Delete one example, or all, from the disk too; with all, private parameters as well. Returns how many were deleted.

        Raises:
            StorageError: it may still be there; free some space and ask again.
        """
        self._require_open()
        count = self.examples.forget(example_id)
        if example_id is None:  # nor what was made of them
            self._keeping.forget()
            self._models.refresh()
        return count

    def count(self, labelled: bool = False) -> int:
        """How many examples are kept.

        Raises:
            StorageError: the disk is full or the file is locked, and they cannot be read now.
        """
        self._require_open()
        return self.examples.count(labelled)

    def predict(self, text: str, text_pair: str | None = None, *, keep: bool = False) -> Prediction:
        """The label of a text, by the newest model on the device (fetched now if there is none yet).

        Args:
            keep: among the examples, still without a label, so that `correct(prediction.example_id, label)` can give it one.

        Raises:
            LinkError: no model yet and no coordinator to get one from.
            StorageError: no model yet and no space for one.
            ConfigurationError: the device was closed.
        """
        self._require_open()
        model = self._model()
        rows = model.trainer.encode([text], [text_pair])
        logits = model.trainer.logits(model.theta, *pad(rows))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        labels = model.trainer.artifact.manifest.labels
        best = int(shares.argmax())
        example = self.examples.add([(text, None, text_pair)]).ids[0] if keep else 0
        return Prediction(
            labels[best], float(shares[best]), dict(zip(labels, map(float, shares), strict=True)), example
        )

    def enrol(self) -> None:
        """Make the device known to the coordinator now; otherwise it is when it first needs to be.

        Raises:
            LinkError: unreachable, or refused (the name is another device's, the enrolment key is wrong).
            StorageError: the disk is full.
        """
        self._require_open()
        with writing(self.home):
            self._participation.ensure_enrolled()

    def fetch(self) -> bool:
        """Fetch the channel's newest release now, if it is newer than what the device holds. True if it was.

        Raises:
            LinkError: unreachable, or nothing is released. ArtifactError: what came is not what was promised.
            StorageError: the disk is full; the next call goes on where this one stopped.
        """
        self.enrol()
        self._require_transfer()
        newest = self._link.latest(self.channel).release
        if newest.id <= self._models.held_release_id():
            return False
        self._voice.say("fetching a new model")
        with writing(self.home):
            self._models.adopt(newest, self._require_transfer)
        return True

    def start(self) -> None:
        """Take part in rounds from a background thread; returns at once.

        Raises:
            ConfigurationError: the device was closed.
        """
        self._require_open()
        if (
            self._thread is threading.current_thread()
        ):  # from a callback: it goes on, also if that had stopped it before
            self._participation.stopping.clear()
            return
        with self._lifecycle:
            if self._thread is not None and self._participation.stopping.is_set():
                self._thread.join()  # a callback has stopped it, and it has not ended yet
            if self._thread is None or not self._thread.is_alive():
                self._participation.stopping.clear()
                self._thread = threading.Thread(target=self._take_part, name=f"pocketfed-{self.name}", daemon=True)
                self._thread.start()

    def _take_part(self) -> None:
        self._participation.run()
        if self._closed:  # by a callback of this thread
            self._let_go()

    def reconsider(self) -> None:
        """Something has changed that the readings show (plugged in, on Wi-Fi): look now, not within ten seconds."""
        self._require_open()
        self._participation.reconsider()

    def _require_open(self) -> None:
        if self._forked:
            raise ConfigurationError(
                f"device {self.name!r} belongs to the process that this one was forked from; start processes that use "
                'pocketfed with the method "spawn", and make their devices there'
            )
        if self._closed:
            raise ConfigurationError(f"device {self.name!r} was closed; make a new one")

    def stop(self) -> None:
        """Stop taking part; returns when the background thread has ended, at most one training step later.

        Calls to the coordinator that are under way end, a `predict()` that fetches its first model among them.
        """
        if self._forked:
            return
        self._participation.stop()
        if self._thread is threading.current_thread():  # from a callback: the thread ends when that returns
            return
        with self._lifecycle:
            thread = self._thread  # not before: another thread may just have started one
            while thread is not None and thread.is_alive():
                self._participation.stop()
                self._link.cancel()
                thread.join(0.1)  # once more, for a call that began just then
            self._thread = None

    def close(self) -> None:
        """Stop, and let go of home."""
        if not self._closed and not self._forked:
            self.stop()
            self._closed = True
            if self._thread is not threading.current_thread():  # from a callback: once that thread has ended
                self._let_go()

    def _let_go(self) -> None:
        self._link.close()
        self.examples.close()
        self._usage.save()
        release(self._lock_file)

    def _abandon(self) -> None:
        """In a forked child: let go of home's lock, which the parent goes on holding, and refuse every call."""
        self._forked = True
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, self._lock_file.fileno())
        os.close(nowhere)

    def status(self) -> str:
        """What the device does or waits for, in words."""
        return self._voice.status

    def state(self) -> State:
        """The same and more, for an app to show."""
        self._require_open()
        shelf, examples = self._models.shelf, 0
        with contextlib.suppress(StorageError):  # `last_error` has it
            examples = self.examples.count(labelled=True)
        return State(
            status=self._voice.status,
            waits_for=self._voice.waits_for,
            progress=self._voice.progress,
            release=shelf.in_use.id if shelf is not None else 0,
            artifact=shelf.in_use.artifact if shelf is not None else "",
            examples=examples,
            bytes_today=self._usage.bytes_today(),
            last_error=self._voice.last_error,
        )

    def _model(self) -> Model:
        """The model in use; fetched now if there is none yet."""
        model = self._models.current()
        if model is None:
            self._require_transfer()
            with self._setup:
                self.enrol()
                model = self._models.current()  # the background thread may have fetched one meanwhile
                if model is None:
                    self._voice.say("fetching a new model")
                    with writing(self.home):
                        model = self._models.adopt(self._link.latest(self.channel).release, self._require_transfer)
        return model

    def _require_transfer(self, _fraction: float = 0.0) -> None:
        """
        Raises:
            LinkError: the network may not be used now.
        """
        missing = self._watch.look().transfer
        if missing:
            raise LinkError(f"no model is fetched now: the device waits for {', '.join(missing.values())}")
