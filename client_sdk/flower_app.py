"""The same `perform()` as a Flower ClientApp, for simulations and for Flower's own runtimes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pocketfed.client_sdk.perform import Kind, Task, perform
from pocketfed.client_sdk.trainer import Examples, TrainConfig, Trainer
from pocketfed.model.parameters import encode_vector

THETA = "theta"


def make_client_app(trainer: Callable[[], Trainer], local: Callable[[Context], tuple[str, Examples]]) -> ClientApp:
    """A ClientApp whose train and evaluate functions are `perform()`.

    Args:
        trainer: gives the trainer (shared by all devices of a process; it holds no device's state).
        local: gives a device's name and examples from its context (`context.node_config`).

    Messages carry "arrays" {"theta": (P,) float32} and "config" (TrainConfig's fields, "server-round"); replies "arrays"
    with the trained theta, "metrics" with "num-examples", and "update" with the size and SHA-256 that the difference has
    on pocketfed's own wire.
    """
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        task, examples = _read(message, context, local)
        reply = perform(trainer(), task, examples)
        wire = encode_vector("delta", reply.delta)
        trained = Array(task.theta + reply.delta)
        # For a coordinator in the same process: the difference as a device uploads it. The rounded sum has lost some bits.
        trained.__dict__["delta"] = reply.delta
        arrays = ArrayRecord()
        arrays[THETA] = trained  # not in the constructor: that would make another Array
        content = {
            "arrays": arrays,
            "metrics": MetricRecord({"num-examples": reply.num_examples, **reply.metrics}),
            "update": ConfigRecord({"bytes": len(wire), "digest": hashlib.sha256(wire).hexdigest()}),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()  # type: ignore[untyped-decorator]
    def evaluate(message: Message, context: Context) -> Message:
        task, examples = _read(message, context, local)
        reply = perform(trainer(), task, examples)
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": reply.num_examples, **reply.metrics})}),
            reply_to=message,
        )

    return app


def _read(
    message: Message, context: Context, local: Callable[[Context], tuple[str, Examples]]
) -> tuple[Task, Examples]:
    config = dict(message.content["config"])
    name, examples = local(context)
    kind: Kind = "train" if message.metadata.message_type.startswith("train") else "evaluate"
    theta = message.content["arrays"][THETA].numpy()
    return Task(kind, theta, TrainConfig.from_mapping(config), int(config["server-round"]), name), examples
