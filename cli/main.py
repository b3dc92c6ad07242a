"""The `pocketfed` command: its sub-commands, and how mistakes are told."""

from __future__ import annotations

import os
import sys

import typer

from pocketfed.cli import fleet, model, simulate

app = typer.Typer(
    name="pocketfed", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Distill a MobileBERT student, fine-tune it on a fleet of devices whose text stays with them, and watch.",
)
app.command()(model.distill)
app.command()(model.quantize)
app.command()(model.inspect)
app.command()(model.evaluate)
app.command()(fleet.publish)
app.command()(fleet.serve)
app.command()(fleet.device)
app.command()(simulate.simulate)
app.command()(fleet.dashboard)


def main() -> None:
    """Run a sub-command. A mistake ends with exit code 1 and one sentence on stderr; a usage error with 2."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        if os.environ.get("POCKETFED_TRACEBACK"):
            raise
        _fail(explain(error), 1)


def explain(error: Exception) -> str:
    """One sentence for any exception."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("pocketfed"):
        return f"this command needs {error.name}, which is not installed; run: pip install 'pocketfed[simulation]'"
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("pocketfed."):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {text or 'no details'}; POCKETFED_TRACEBACK=1 shows where"


def _fail(sentence: str, code: int) -> None:
    print(f"pocketfed: {sentence}", file=sys.stderr)
    sys.exit(code)
