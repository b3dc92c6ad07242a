"""What a SuperNode runs: a pocketfed device; `--node-config` names its artifact's folder, its data file and the device."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pocketfed.client_sdk.artifacts import open_artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.model.tasks import read_dataset
from pocketfed.simulations.run import encode_examples

app = ClientApp()


@app.train()
@app.evaluate()
def device(message: Message, context: Context) -> Message:
    node, config = context.node_config, message.content["config"]
    trainer = PlanTrainer(open_artifact(Path(str(node["artifact"]))), str(config["trainable-set"]))
    data = read_dataset(Path(str(node["data"])), labelled=False)
    examples = encode_examples(trainer, data.train, int(config["max-length"]))
    return make_client_app(lambda: trainer, lambda _: (str(node["name"]), examples))(message, context)
