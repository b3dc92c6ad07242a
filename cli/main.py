"""The `pocketfed` command: its sub-commands, and how mistakes are told."""

from __future__ import annotations

import os
import sys

import typer
import typer.core

from pocketfed.cli import access, advise, database, fleet, health, model, simulate

# What each sub-command needs beyond the base install, as extras of the distribution.
EXTRAS = {
    "distill": "torch", "quantize": "torch", "inspect": "torch", "evaluate": "coordinator", "publish": "coordinator",
    "serve": "coordinator", "simulate": "simulation", "dashboard": "dashboard",
    "demo": "simulation", "export": "executorch", "advise": "simulation",
    "db": "coordinator", "certs": "coordinator", "keys": "coordinator",
    "enrolment-key": "coordinator", "devices": "coordinator", "release": "coordinator", "operator": "coordinator",
    "audit": "coordinator",
}  # fmt: skip

typer.core.HAS_RICH = False  # else the plain --help shows rich's escapes: "\[required]"

app = typer.Typer(
    name="pocketfed", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Distill a MobileBERT student, fine-tune it on a fleet of devices whose text stays with them, and watch.",
)  # fmt: skip
app.command()(model.distill)
app.command()(model.quantize)
app.command()(model.inspect)
app.command()(model.evaluate)
app.command()(model.export)
app.command()(fleet.publish)
app.command()(fleet.serve)
app.command()(fleet.device)
app.command()(health.health)
app.command()(simulate.simulate)
app.command()(advise.advise)
app.command()(fleet.dashboard)
app.command()(simulate.demo)
app.add_typer(database.app, name="db")
app.command()(access.certs)
app.add_typer(access.keys, name="keys")
app.add_typer(access.enrolment_key, name="enrolment-key")
app.add_typer(access.devices, name="devices")
app.add_typer(access.release, name="release")
app.add_typer(access.operator, name="operator")
app.command()(access.audit)


def main() -> None:
    """Run a sub-command. A mistake ends with one sentence on stderr and exit code 1; 2 where an option is wrong."""
    arguments = sys.argv[1:] or ["--help"]
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each stranger's failed handshake is a line in the log
    try:
        code = app(arguments, prog_name="pocketfed", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if os.environ.get("POCKETFED_TRACEBACK"):
            raise
        _fail(explain(error, arguments[0]), 2 if is_usage(error) else 1)
    if code == 130:
        _fail("stopped", 130)
    sys.exit(code if isinstance(code, int) else 0)


def is_usage(error: Exception) -> bool:
    """Was it click's parser that refused? Told by shape: newer versions of typer bring a click of their own."""
    return hasattr(error, "format_message") and hasattr(error, "ctx")


def explain(error: Exception, command: str = "") -> str:
    """One sentence, on one line, for any exception."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("pocketfed"):
        extra = EXTRAS.get(command, "simulation")
        return f"{command} needs {error.name}, which is not installed; run: pip install 'pocketfed[{extra}]'"
    if is_usage(error):
        told = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        context = error.ctx  # type: ignore[attr-defined]
        return f"{told}; see {context.command_path if context else 'pocketfed'} --help"
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("pocketfed."):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {text or 'no details'}; POCKETFED_TRACEBACK=1 shows where"


def _fail(sentence: str, code: int) -> None:
    print(f"pocketfed: {sentence}", file=sys.stderr)
    sys.exit(code)
