"""device: the SDK as a process of its own, on base dependencies alone; options come from the environment or a file too."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pocketfed.cli.output import CommandError, UsageError, format_skipped
from pocketfed.cli.service import notify, write_status
from pocketfed.cli.stopping import on_termination, wait

SUMMARY = "Be a device: take part in rounds with the texts in --data, until told to stop."
EPILOG = """\
An option that is not given is looked for in the environment (--max-memory-mb: POCKETFED_MAX_MEMORY_MB), then in the
file that --config names (max_memory_mb = 300). Ends with 0 when told to by SIGTERM or Ctrl-C, 2 when an option,
variable or setting is wrong, 1 when it cannot go on; standard output has what the device does, standard error the log.
"""
PREFIX = "POCKETFED_"
DEFAULTS = {
    "name": None, "channel": "stable", "tier": "", "enrolment_key": "", "enrolment_key_file": None, "ca": None, "publisher": "",
    "allow_plaintext_off_loopback": False, "max_memory_mb": 0.0, "holdout": 0.2, "status_file": None, "log_level": "warning",
}  # fmt: skip
REQUIRED = ("coordinator", "data", "home")
LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see pocketfed device --help")


def parser() -> Parser:
    """What it leaves out was not given: defaults come after the environment and the file."""
    made = Parser(
        "pocketfed device", description=SUMMARY, epilog=EPILOG, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--coordinator", metavar="HOST:PORT", help="Required.")
    add("--data", metavar="PATH", type=Path, help="This device's labelled texts; they stay here. Required.")
    add("--home", metavar="FOLDER", type=Path, help="A folder for this device alone. Required.")
    add("--name", metavar="TEXT", help="Unique in the fleet; by default a random one.")
    add("--channel", metavar="TEXT", help="Whose releases to follow. [default: stable]")
    add(
        "--tier",
        metavar="TEXT",
        help="A word for what kind of device this is, to be counted by. [default: none is told]",
    )
    add("--enrolment-key", metavar="TEXT", help="Where the coordinator asks for one.")
    add("--enrolment-key-file", metavar="FILE", type=Path, help="Read the enrolment key from here instead.")
    add("--ca", metavar="FILE", type=Path, help="The CA of the coordinator's certificate (`ca.pem` of `certs`).")
    add("--publisher", metavar="HEX", help="The publisher's root key to trust; by default the first one that is met.")
    add("--allow-plaintext-off-loopback", action="store_true",
        help="No TLS to another machine: who is in between reads along.")  # fmt: skip
    add("--max-memory-mb", metavar="MB", type=_megabytes,
        help="Keep the process below it while it computes; 0: no limit. [default: 0]")  # fmt: skip
    add("--holdout", metavar="SHARE", type=_share,
        help="Share of the texts that a new model is judged by, never trained on. [default: 0.2]")  # fmt: skip
    add("--status-file", metavar="FILE", type=Path, help="Keep what the device does here as JSON, for health checks.")
    add("--log-level", choices=LEVELS, help="What goes to standard error. [default: warning]")
    add("--config", metavar="FILE", type=Path, help="A TOML file with any of these.")
    return made


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:  # NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is no number of MB; give 0 or more")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:  # NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number from 0 to 0.5")
    return value


def read_options(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The command line before the environment before the file.

    Raises:
        UsageError: something that is given is wrong, or something is missing.
    """
    known = parser()
    given = vars(known.parse_args(arguments))
    names = [action.dest for action in known._actions if action.dest != "help"]
    variables = {n: environment[PREFIX + n.upper()] for n in names if environment.get(PREFIX + n.upper())}
    given = _checked(known, variables, "the environment") | given
    if "config" in given:
        given = _checked(known, _read_toml(given["config"], names), str(given["config"])) | given
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        name = missing[0]
        raise UsageError(f"--{name} is missing; give it, or {PREFIX}{name.upper()}, or {name} in a --config file")
    options = argparse.Namespace(**DEFAULTS | given)
    if options.enrolment_key_file:
        if options.enrolment_key:
            raise UsageError(f"there is an enrolment key and {options.enrolment_key_file}; give one of the two")
        options.enrolment_key = options.enrolment_key_file.read_text().strip()
    return options


def _read_toml(path: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; --config names a TOML file") from None
    except ValueError as error:
        raise UsageError(f"{path} is no TOML file: {error}") from None
    for name in settings:
        if name not in names or name == "config":
            raise UsageError(f"{path} has {name!r}, which is no setting; known are {', '.join(sorted(names))}")
    return settings


def _checked(known: Parser, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings from elsewhere, by the command line's own rules."""
    words = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if not isinstance(value, str | int | float):
            raise UsageError(f"{where}: {name} is {value!r}; give one value")
        if DEFAULTS.get(name) is not False:
            words.append(f"{option}={value}")
        elif str(value).lower() in ("1", "true"):
            words.append(option)
        elif str(value).lower() not in ("0", "false"):
            raise UsageError(f"{where}: {name} is {value!r}; give true or false")
    try:
        return vars(known.parse_args(words))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code when the device was told to stop.

    Raises:
        UsageError, CommandError, the SDK's errors: why it does not run.
    """
    options = read_options(arguments, os.environ)
    stopping = threading.Event()
    on_termination(stopping.set)  # at once: in a container, process 1 has no other way to end
    with _logging_to_stderr(options.log_level):
        run(options, stopping)
    return 0


def run(options: argparse.Namespace, stopping: threading.Event) -> None:
    """Be the device until `stopping` is set."""
    from pocketfed.client_sdk import Device
    from pocketfed.model.tasks import read_dataset

    def tell(status: str) -> None:
        if options.status_file:
            write_status(options.status_file, status, ok=not status.startswith("will try again"))
        notify(f"STATUS={status}")
        print(status, flush=True)

    dataset = read_dataset(options.data, labelled=False)
    with Device(
        options.coordinator,
        options.home,
        name=options.name,
        channel=options.channel,
        tier=options.tier,
        enrolment_key=options.enrolment_key,
        max_memory_mb=options.max_memory_mb,
        holdout=options.holdout,
        ca=options.ca,
        publisher=options.publisher,
        allow_plaintext_off_loopback=options.allow_plaintext_off_loopback,
        on_status=tell,
    ) as member:
        member.examples.forget()  # the file is the truth: home's copy is made anew
        added = member.add_examples((e.text, e.label, e.text_pair) for e in dataset.train)
        skipped = dict(Counter(dataset.skipped) + Counter(added.skipped))
        note = f", {format_skipped(skipped)}" if skipped else ""
        print(f"{member.name}: {member.examples.count(labelled=True)} labelled examples{note}", flush=True)
        if options.status_file:
            _check_status_file(options.status_file)
        if not stopping.is_set():
            member.start()
            notify("READY=1")
            wait(stopping)
        notify("STOPPING=1")


def _check_status_file(path: Path) -> None:
    """Better now than with every change of status.

    Raises:
        CommandError: it cannot be written.
    """
    try:
        write_status(path, "starting", ok=True)
    except OSError as error:
        raise CommandError(
            f"--status-file {path} cannot be written: {error.strerror}; name a file in a folder"
        ) from None


@contextmanager
def _logging_to_stderr(level: str) -> Iterator[None]:
    """The command's log, not the SDK's: an app that embeds the SDK has its own."""
    log, handler = logging.getLogger("pocketfed"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(level.upper())
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
