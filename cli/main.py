"""The `pocketfed` command: which part runs what, and how mistakes are told. Needs no more than a device has."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pocketfed.cli.output import UsageError

# What each sub-command but `device` needs beyond the base install, as extras of the distribution.
EXTRAS = {
    "distill": "torch", "quantize": "torch", "inspect": "torch", "evaluate": "coordinator", "publish": "coordinator",
    "serve": "coordinator", "simulate": "simulation", "dashboard": "dashboard",
    "demo": "simulation", "export": "torch", "advise": "simulation",
    "db": "coordinator", "certs": "coordinator", "keys": "coordinator",
    "enrolment-key": "coordinator", "devices": "coordinator", "release": "coordinator", "operator": "coordinator",
    "audit": "coordinator", "baseline": "coordinator",
}  # fmt: skip

EXTRA_OF = {"openvino": "openvino", "executorch": "executorch"}  # engines that only `export --to` needs


def main() -> None:
    """Run a sub-command. A mistake ends with one sentence on stderr and exit code 1; 2 where an option is wrong."""
    arguments = sys.argv[1:] or ["--help"]
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each stranger's failed handshake is a line in the log
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if os.environ.get("POCKETFED_TRACEBACK"):
            raise
        _fail(explain(error, arguments[0]), 2 if is_usage(error) else 1)
    if code == 130:
        _fail("stopped", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _run(arguments: Sequence[str]) -> object:
    command = arguments[0]
    if command == "device":
        from pocketfed.cli import device

        return device.main(arguments[1:])
    try:
        from pocketfed.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer" or command in EXTRAS:
            raise
        if command in ("--help", "-h"):
            print(device_help())
            return 0
        raise UsageError(f"there is no command {command!r} here; see pocketfed --help") from None
    return app(arguments, prog_name="pocketfed", standalone_mode=False)


def device_help() -> str:
    """What --help says where only a device's needs are installed."""
    from pocketfed.cli.device import SUMMARY

    lines = [
        "Usage: pocketfed COMMAND [ARGS]...",
        "",
        f"  device  {SUMMARY}",
        "",
        "More commands come with an extra:",
        "",
    ]
    for extra in sorted(set(EXTRAS.values())):
        names = ", ".join(name for name, needed in EXTRAS.items() if needed == extra)
        lines.append(f"  pip install 'pocketfed[{extra}]'  {names}")
    return "\n".join(lines)


def is_usage(error: Exception) -> bool:
    """Was an option refused? click's refusal is told by shape: newer versions of typer bring a click of their own."""
    return isinstance(error, UsageError) or (hasattr(error, "format_message") and hasattr(error, "ctx"))


def explain(error: Exception, command: str = "") -> str:
    """One sentence, on one line, for any exception."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("pocketfed"):
        extra = EXTRA_OF.get(str(error.name)) or EXTRAS.get(command, "simulation")
        return f"{command} needs {error.name}, which is not installed; run: pip install 'pocketfed[{extra}]'"
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("pocketfed."):
        return text
    if is_usage(error):
        told = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        context = error.ctx  # type: ignore[attr-defined]
        return f"{told}; see {context.command_path if context else 'pocketfed'} --help"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {text or 'no details'}; POCKETFED_TRACEBACK=1 shows where"


def _fail(sentence: str, code: int) -> None:
    print(f"pocketfed: {sentence}", file=sys.stderr)
    sys.exit(code)
