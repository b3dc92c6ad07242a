"""Which replies may touch the model, and how far: what fails is quarantined, what is too long or too heavy is cut."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import ArrayRecord, Message

from pocketfed.coordinator.aggregation import Compass, Delta, norm
from pocketfed.coordinator.grid import UNREADABLE
from pocketfed.coordinator.strategy import THETA, DeltaArray
from pocketfed.coordinator.validation import (
    History,
    Limits,
    Reference,
    Refusal,
    capped_examples,
    check_examples,
    check_form,
    check_norm,
    check_values,
    clip_scale,
    reference,
)
from pocketfed.model.parameters import ParametersError, Vector

WARM_UP = 32  # updates a median is taken over before any of them is judged by it, where earlier rounds gave fewer


@dataclass
class Tally:
    """What became of a round's assignments: id -> (status, reason, norm). cosines: id -> to the run's last step."""

    statuses: dict[str, tuple[str, str | None, float | None]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    clipped: int = 0
    capped: int = 0

    @property
    def accepted(self) -> int:
        return sum(status == "aggregated" for status, _, _ in self.statuses.values())


@dataclass(frozen=True)
class _Inspected:
    """A reply with what can be said of it alone. delta and norm: None where its form is wrong."""

    reply: Message
    delta: Delta | None = None
    norm: float | None = None
    refusal: Refusal | None = None


def screen(
    replies: Iterable[Message],
    start: Vector,
    limits: Limits,
    tally: Tally,
    history: History | None = None,
    step: Vector | None = None,
) -> Iterator[Message]:
    """Only the replies that may touch the model: the long ones clipped, their weights capped. What became of each is
    tallied. They come as `DeltaArray`s, so that a strategy that can reads updates rather than parameters.

    Args:
        start: theta (P,) that the round began with.
        history: of the run; what is missing to WARM_UP updates is taken from this round's own first ones.
        step: (P,) how the round before moved theta. Each update's cosine to it is tallied, for people: nothing is
            refused by it, since honest devices with unlike data may well pull apart.
    """
    history = history or History()
    compass = Compass.of(step)
    inspected = _inspect_all(replies, start, limits.size, tally, dict(history.digests or {}), compass)
    missing = WARM_UP - len(history.norms)
    known, first = reference(history), deque[_Inspected]()
    while missing > 0 and (found := next(inspected, None)) is not None:
        if found.delta is not None:
            found.delta.drop()
        first.append(found)
        known, usable = _agree(first, limits, history)
        missing = WARM_UP - len(history.norms) - usable
    while first:
        yield from _judge(first.popleft(), start, limits, known, tally)
    for found in inspected:
        yield from _judge(found, start, limits, known, tally)


def _agree(found: Iterable[_Inspected], limits: Limits, history: History) -> tuple[Reference, int]:
    """Medians of the history and of those updates that pass by these very medians, as if the others had never come."""
    known = Reference()
    good = [(f.norm, f.reply.content["metrics"]["num-examples"]) for f in found if f.refusal is None and f.norm]
    while True:
        left = [(norm, told) for norm, told in good if check_norm(norm, limits, known) is None]
        again = reference(history.and_these([n for n, _ in left], [e for _, e in left]))
        if again == known:
            return known, len(left)
        known, good = again, left


def _inspect_all(
    replies: Iterable[Message], start: Vector, size: int, tally: Tally, digests: dict[str, int], compass: Compass | None
) -> Iterator[_Inspected]:
    """Everything about a reply but its norm. digests: of updates seen in earlier rounds; this round's are added."""
    here: set[str] = set()
    for reply in replies:
        row_id = reply.metadata.reply_to_message_id
        if reply.has_error() and reply.error.code != UNREADABLE:
            tally.statuses[row_id] = ("failed", str(reply.error.reason)[:500], None)
            continue
        if reply.has_error():
            yield _Inspected(reply, refusal=Refusal("unreadable", str(reply.error.reason)))
            continue
        found = _inspect(reply, start, size)
        digest = str(reply.content["update"]["digest"]) if "update" in reply.content else ""
        if digest and found.refusal is None:
            if digest in here:
                copied = Refusal("duplicate", "another device of this round has handed in the very same bytes")
                found = dataclasses.replace(found, refusal=copied)
            elif digest in digests:
                copied = Refusal("repeated", f"the very same bytes were handed in in round {digests[digest]}")
                found = dataclasses.replace(found, refusal=copied)
            here.add(digest)
        if compass is not None and found.delta is not None and found.norm:
            cosine = compass.cosine(found.delta.raw(), found.norm)
            if cosine is not None:
                tally.cosines[row_id] = cosine
        yield found


def _inspect(reply: Message, start: Vector, size: int) -> _Inspected:
    try:
        delta = _read(reply, start, size)
        if isinstance(delta, Refusal):
            return _Inspected(reply, refusal=delta)
        vector = delta.raw()
    except (ParametersError, ValueError, TypeError, KeyError) as error:
        return _Inspected(reply, refusal=Refusal("unreadable", str(error)))
    length = norm(vector)
    refusal = check_examples(reply.content["metrics"].get("num-examples")) or check_values(vector, length)
    return _Inspected(reply, delta, length if np.isfinite(length) else None, refusal)


def _read(reply: Message, start: Vector, size: int) -> Delta | Refusal:
    """The update of a reply. Flower's replies hold trained parameters; ours in the same process the update, too."""
    record = reply.content["arrays"]
    array = record.get(THETA)
    if isinstance(array, DeltaArray) and len(record) == 1:
        return array.delta
    exact = array.__dict__.get("delta") if len(record) == 1 and array is not None else None
    # What has made the trained parameters in this process: those need not be read.
    arrays = {name: value.numpy() for name, value in record.items()} if exact is None else {THETA: exact}
    refusal = check_form(arrays, THETA, size)
    if refusal is not None:
        return refusal
    with np.errstate(over="ignore", invalid="ignore"):
        return Delta(arrays[THETA] - start if exact is None else exact, size)


def _judge(found: _Inspected, start: Vector, limits: Limits, known: Reference, tally: Tally) -> Iterator[Message]:
    """The reply as it may be aggregated, or nothing."""
    reply, row_id = found.reply, found.reply.metadata.reply_to_message_id
    refusal = found.refusal
    if refusal is None and found.norm is not None:
        refusal = check_norm(found.norm, limits, known)
    if refusal is not None or found.delta is None or found.norm is None:
        tally.statuses[row_id] = ("quarantined", str(refusal)[:500], found.norm)
        return
    tally.statuses[row_id] = ("aggregated", None, found.norm)
    record, delta = reply.content["metrics"], found.delta
    scale, told = clip_scale(found.norm, limits, known), record["num-examples"]
    counted = capped_examples(told, limits, known, scale * found.norm)
    if counted < told:
        record["num-examples"], tally.capped = counted, tally.capped + 1
    if scale < 1.0:
        delta, tally.clipped = delta.scaled(scale), tally.clipped + 1
    array = reply.content["arrays"][THETA]
    if not isinstance(array, DeltaArray) or array.delta is not delta:
        arrays = ArrayRecord()
        arrays[THETA] = DeltaArray(start, delta)  # not in the constructor: that would make a plain Array of it
        reply.content["arrays"] = arrays
    yield reply


def screen_measured(replies: Iterable[Message], max_examples: int) -> Iterator[Message]:
    """Only the evaluations that count examples, their weights capped."""
    for reply in replies:
        if not reply.has_error() and reply.content["metrics"]["num-examples"] >= 1:
            record = reply.content["metrics"]
            record["num-examples"] = min(record["num-examples"], max_examples)
            yield reply


def with_common_metrics(replies: Iterable[Message]) -> list[Message]:
    """Replies without the metrics that not all of them have: Flower's strategies refuse the whole round over one."""
    held = list(replies)
    records = [reply.content["metrics"] for reply in held if not reply.has_error()]
    common = set.intersection(*(set(record) for record in records)) if records else set()
    for record in records:
        for name in set(record) - common:
            del record[name]
    return held
