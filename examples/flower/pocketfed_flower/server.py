"""What the SuperLink runs: Flower's own FedAvg, from an artifact's initial parameters, over one array, "theta"."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from pocketfed.client_sdk.artifacts import open_artifact
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.model.parameters import encode_vector

FOR_DEVICES = ("trainable-set", "epochs", "batch-size", "learning-rate", "max-length", "seed")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    run = context.run_config
    config = ConfigRecord({name: run[name] for name in FOR_DEVICES})
    trainer = PlanTrainer(open_artifact(Path(str(run["artifact"]))), str(run["trainable-set"]))
    nodes = int(run["nodes"])
    strategy = FedAvg(min_train_nodes=nodes, min_evaluate_nodes=nodes, min_available_nodes=nodes)
    result = strategy.start(
        grid,
        ArrayRecord({"theta": Array(trainer.initial_theta())}),
        num_rounds=int(run["num-server-rounds"]),
        train_config=config,
        evaluate_config=config,
    )
    Path(str(run["out"])).write_bytes(encode_vector("theta", result.arrays["theta"].numpy()))
