"""The same `perform()` as a Flower ClientApp, for simulations and for Flower's own runtimes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pocketfed.client_sdk.outgoing import Kept, UpdateForm
from pocketfed.client_sdk.perform import Kind, Reply, Task, performing
from pocketfed.client_sdk.trainer import Asking, Examples, TrainConfig, Trainer, converse
from pocketfed.model.parameters import CONTROL, Vector

THETA = "theta"
FORM = "update."  # before the names of UpdateForm's fields in a message's config
KEPT = "kept"  # in a context's state
Local = Callable[[Context], tuple[str, Examples]]


def make_client_app(trainer: Callable[[], Trainer], local: Local, seeded_noise: bool = False) -> ClientApp:
    """A ClientApp whose train and evaluate functions are `perform()`.

    Args:
        trainer: gives the trainer (shared by all devices of a process; it holds no device's state).
        local: gives a device's name and examples from its context (`context.node_config`).
        seeded_noise: as in `Task`, for simulations.

    Messages carry "arrays" {"theta": (P,) float32} and "config" (TrainConfig's fields, UpdateForm's as "update.NAME",
    "server-round"); replies "arrays" with theta and what the update says, "metrics" with "num-examples", and "update" with
    the size and SHA-256 of the update's bytes on pocketfed's own wire. What stays on a device is in its context's state.
    """
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        model = trainer()
        return converse(answering(message, context, model, local, seeded_noise), model)

    @app.evaluate()  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        model = trainer()
        return converse(answering(message, context, model, local, seeded_noise), model)

    return app


def answering(
    message: Message, context: Context, trainer: Trainer, local: Local, seeded_noise: bool = False
) -> Asking[Message]:
    """What the app makes of a message, but for the gradients: those it asks for."""
    name, examples = local(context)
    task = read_task(message, name, seeded_noise)
    reply = yield from performing(trainer, task, examples, kept=kept_of(context))
    return reply_message(message, context, task, reply)


def read_task(message: Message, name: str, seeded_noise: bool = False, theta: Vector | None = None) -> Task:
    """What a message asks of the device of that name. theta: what its arrays hold, where that has been read already."""
    config = dict(message.content["config"].items())  # of a Mapping it would look up each name
    kind: Kind = "train" if message.metadata.message_type.startswith("train") else "evaluate"
    arrays = message.content["arrays"]
    start = arrays[THETA].numpy() if theta is None else theta
    number = int(config.pop("server-round"))
    how, form = _configured(tuple((k, type(v), tuple(v) if isinstance(v, list) else v) for k, v in config.items()))
    control = arrays[CONTROL].numpy() if CONTROL in arrays else None
    return Task(kind, start, how, number, name, form, seeded_noise, control)


@lru_cache(maxsize=32)  # a round's devices are told the same; types: 1 and 1.0 are equal, but not the same
def _configured(told: tuple[tuple[str, type, Any], ...]) -> tuple[TrainConfig, UpdateForm]:
    form = UpdateForm.from_mapping({k.removeprefix(FORM): v for k, _, v in told if k.startswith(FORM)})
    return TrainConfig.from_mapping({k: v for k, _, v in told}), form


def reply_message(message: Message, context: Context, task: Task, reply: Reply) -> Message:
    """A reply as a message; what stays on the device goes into its context."""
    content = {"metrics": MetricRecord({"num-examples": reply.num_examples, **reply.metrics})}
    if task.kind == "evaluate":
        return Message(RecordDict(content), reply_to=message)
    kept = {field.name: getattr(reply.kept, field.name) for field in dataclasses.fields(reply.kept)}
    if any(values.size for values in kept.values()):
        context.state[KEPT] = _record(kept)
    # A class of our own would be cheaper, but a SuperLink knows an object by its class's name, and only Flower's.
    trained = Array(task.theta + reply.delta)
    # For a coordinator in the same process: the difference as a device uploads it. The rounded sum has lost some bits.
    trained.__dict__["delta"] = reply.delta
    arrays = ArrayRecord()
    arrays[THETA] = trained  # not in the constructor: that would make another Array
    told = ConfigRecord({"bytes": len(reply.data), "digest": hashlib.sha256(reply.data).hexdigest()})
    return Message(RecordDict(content | {"arrays": arrays, "update": told}), reply_to=message)


def kept_of(context: Context) -> Kept | None:
    """What stayed on the device from the rounds before."""
    if KEPT not in context.state:
        return None
    record = context.state[KEPT]
    return Kept(**{name: array.numpy() for name, array in record.items()})


def _record(values: Mapping[str, Vector]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in values.items()})
