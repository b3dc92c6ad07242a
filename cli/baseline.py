"""baseline record, baseline list: what a run is compared with, for the dashboard's curves."""

from __future__ import annotations

from typing import Annotated

import typer

from pocketfed.cli.database import opened
from pocketfed.cli.options import Database, Json, group
from pocketfed.cli.output import UsageError, print_rows

app = group("What a run is compared with: central and local-only training, the model before. Drawn by the dashboard.")
Run = Annotated[int, typer.Argument(help="A run's number, as the dashboard shows it.")]


@app.command("record")
def record(
    run: Run,
    kind: Annotated[str, typer.Argument(help="central, local or previous.")],
    database: Database,
    accuracy: Annotated[float | None, typer.Option(help="0 to 1, on the run's test.")] = None,
    loss: Annotated[float | None, typer.Option(help="Nats an example, on the run's test.")] = None,
) -> None:
    """Keep what was measured elsewhere beside a run; what was kept of that kind before is replaced."""
    from pocketfed.coordinator.baselines import record_baseline
    from pocketfed.coordinator.operators import acting, local_admin

    if accuracy is None and loss is None:
        raise UsageError("a baseline is a number; give --accuracy, --loss or both")
    with (
        opened(database, must_exist=True) as store,
        acting(store, local_admin(), "baseline.record", f"run {run} {kind}") as session,
    ):
        record_baseline(session, run, kind, {"accuracy": accuracy, "loss": loss})


@app.command("list")
def list_(run: Run, database: Database, json: Json = False) -> None:
    """Show what is kept beside a run."""
    from pocketfed.coordinator.baselines import baselines_of

    with opened(database, create=False) as store, store.read() as session:
        found = baselines_of(session, run)
    print_rows(
        f"beside run {run}",
        [{"kind": k, "metric": m, "value": v} for k, told in found.items() for m, v in told.items()],
        json,
    )
