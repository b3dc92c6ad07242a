"""Every sub-command but `device`, which is to run where typer is not installed."""

from __future__ import annotations

import typer
import typer.core

from pocketfed.cli import (
    access,
    advise,
    baseline,
    dashboard,
    database,
    evaluate,
    health,
    model,
    publish,
    release,
    serve,
    simulate,
)
from pocketfed.cli.device import SUMMARY

typer.core.HAS_RICH = False  # else the plain --help shows rich's escapes: "\[required]"

app = typer.Typer(
    name="pocketfed", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Distill a MobileBERT student, fine-tune it on a fleet of devices whose text stays with them, and watch.",
)  # fmt: skip
app.command()(model.distill)
app.command()(model.quantize)
app.command()(model.inspect)
app.command()(evaluate.evaluate)
app.command()(model.export)
app.command()(publish.publish)
app.command()(serve.serve)
app.command()(health.health)
app.command("device", help=SUMMARY)(lambda: None)  # for --help only: main() gives it to cli/device.py
app.command()(simulate.simulate)
app.command()(advise.advise)
app.command()(dashboard.dashboard)
app.command()(simulate.demo)
app.add_typer(baseline.app, name="baseline")
app.add_typer(database.app, name="db")
app.command()(access.certs)
app.add_typer(access.keys, name="keys")
app.add_typer(access.enrolment_key, name="enrolment-key")
app.add_typer(access.devices, name="devices")
app.add_typer(release.app, name="release")
app.add_typer(access.operator, name="operator")
app.command()(access.audit)
