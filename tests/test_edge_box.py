"""examples/edge_box: the unit and the container say what the command does, and run it where nothing but home is writable."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pocketfed.cli.device import read_options
from pocketfed.cli.service import write_status

if TYPE_CHECKING:
    from pocketfed.coordinator.artifacts import BuiltArtifact
    from pocketfed.model.tasks import Dataset

ROOT = Path(__file__).resolve().parents[1]
BOX = ROOT / "examples" / "edge_box"
UNIT, DOCKERFILE = (BOX / "pocketfed-device.service").read_text(), (BOX / "Dockerfile").read_text()
MOST_EXPOSURE = 15  # of 100, as `systemd-analyze security` counts


def settings(name: str) -> list[str]:
    """All values of a setting of the unit."""
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def of(kind: str) -> list[str]:
    return [value for name, value in instructions() if name == kind]


def variables_of_the_image() -> dict[str, str]:
    return dict(pair.split("=", 1) for value in of("ENV") for pair in value.split())


# ---- the unit --------------------------------------------------------------------------------------------------------


def test_the_unit_gives_the_command_every_setting_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "enrolment-key").write_text("secret\n")
    specifiers = {"%S": "/var/lib", "%d": str(tmp_path)}
    environment = dict(value.split("=", 1) for value in settings("Environment"))
    for specifier, path in specifiers.items():
        environment = {name: value.replace(specifier, path) for name, value in environment.items()}
    (command,) = settings("ExecStart")
    _, device, *arguments = command.replace("/etc/pocketfed/device.toml", str(BOX / "device.toml")).split()
    assert device == "device"
    options = read_options(arguments, environment)
    assert options.home == Path("/var/lib") / settings("StateDirectory")[0]
    assert options.enrolment_key == "secret"
    assert settings("LoadCredential") == ["enrolment-key:/etc/pocketfed/enrolment-key"]
    assert options.max_memory_mb < int(settings("MemoryMax")[0].removesuffix("M")) * 1.048576
    assert settings("Type") == ["notify"]
    assert settings("RestartPreventExitStatus") == ["2"]


def test_systemd_accepts_the_unit_and_finds_it_little_exposed(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze here")
    unit = tmp_path / "pocketfed-device.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT, flags=re.MULTILINE))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", f"--threshold={MOST_EXPOSURE}", unit]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in judged.stderr:
        pytest.skip("this systemd-analyze is older than 250 and judges only what runs")
    assert judged.returncode == 0, judged.stdout[-200:]


# ---- the container ---------------------------------------------------------------------------------------------------


def test_the_image_runs_the_device_without_rights_and_with_one_writable_place() -> None:
    environment = variables_of_the_image()
    assert of("ENTRYPOINT") == ['["pocketfed", "device"]']
    assert of("USER") == ["10001:10001"]
    assert of("VOLUME") == [environment["POCKETFED_HOME"]]
    given = {"POCKETFED_COORDINATOR": "c:1", "POCKETFED_DATA": "/data/mine.jsonl"}  # what `docker run` adds
    options = read_options([], environment | given)
    assert options.status_file.parent == options.home == Path("/var/lib/pocketfed")
    bases = {value.split()[0] for value in of("FROM")}
    assert len(bases) == 1  # what is built in one has to run in the other
    assert "-slim" in bases.pop()


def test_the_health_check_tells_a_device_that_can_do_its_part_from_one_that_cannot(tmp_path: Path) -> None:
    (check,) = of("HEALTHCHECK")
    command = json.loads(check.split("CMD ", 1)[1])
    assert command[-1] == variables_of_the_image()["POCKETFED_STATUS_FILE"]
    command[-1] = str(tmp_path / "status.json")

    def healthy() -> bool:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0

    assert not healthy()  # no file yet
    write_status(tmp_path / "status.json", "waiting for work", ok=True)
    assert healthy()
    write_status(tmp_path / "status.json", 'will try again: it said {"ok": true', ok=False)
    assert not healthy()


def context(folder: Path) -> Path:
    """What `docker build` is sent: the checkout less what Dockerfile.dockerignore leaves out."""
    lines = (BOX / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    never = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / name,
                ignore=lambda _, names: [n for n in names for p in never if fnmatch.fnmatch(n, p)],
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_build_is_sent_every_package_and_no_more(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {place.split("/")[0] for place in project["tool"]["setuptools"]["package-dir"].values()}
    sent = {p.name for p in context(tmp_path / "context").iterdir()}
    assert sent == packages | {"pyproject.toml", "README.md", "LICENSE"}
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.slow
def test_the_commands_of_the_build_make_an_installation_that_runs(tmp_path: Path) -> None:
    """The Dockerfile's own RUN line, in a folder instead of an image: there may be no Docker here, and no registry."""
    run = of("RUN")[0].replace("/opt/pocketfed", str(tmp_path / "opt")).replace("python -m", f"{sys.executable} -m")
    done = subprocess.run(
        run, shell=True, cwd=context(tmp_path / "source"), capture_output=True, text=True, check=False
    )
    if done.returncode and re.search("No matching distribution|ConnectionError|timed out", done.stderr):
        pytest.skip("pip has no package index here")
    assert done.returncode == 0, done.stderr[-2000:]
    shown = subprocess.run(
        [tmp_path / "opt/bin/pocketfed", "device", "--help"], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "POCKETFED_MAX_MEMORY_MB" in shown.stdout


def test_a_device_lives_on_a_read_only_file_system_with_home_alone_writable(
    tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset
) -> None:
    """As under ProtectSystem=strict and `docker run --read-only`: a mount namespace of its own, the root remounted."""
    from pocketfed.coordinator.artifacts import publish_artifact
    from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
    from pocketfed.coordinator.store import Store

    home, data = tmp_path / "home", tmp_path / "mine.jsonl"
    home.mkdir()
    data.write_text("".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in tiny_dataset.train[:8]))
    # Every mount read-only but home, which is bound over itself first.
    script = (
        'mount --bind "$0" "$0" && for place in $(cut -d" " -f2 /proc/self/mounts | sort -ru); do'
        ' [ "$place" = "$0" ] || mount -o remount,ro,bind "$place" 2>/dev/null; done;'
        ' if touch "$1/outside" 2>/dev/null; then exit 99; fi; cd /; exec "$2" -B -m pocketfed.cli device'
    )
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace cannot be made here; it takes root")
    store = Store(str(tmp_path / "fleet.db"))
    with store.write() as session:
        publish_artifact(session, nano_built, "stable", "head")
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server:
        environment = variables_of_the_image() | {
            "PATH": os.environ["PATH"], "POCKETFED_HOME": str(home), "POCKETFED_STATUS_FILE": str(home / "status.json"),
            "POCKETFED_COORDINATOR": f"127.0.0.1:{server.port}", "POCKETFED_DATA": str(data), "HOME": "/nonexistent",
        }  # fmt: skip
        with subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, str(home), str(tmp_path), sys.executable],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            said = []
            for line in child.stdout:
                said.append(line.strip())
                if said.count("waiting for work") == 2:
                    break
            child.terminate()
            _, err = child.communicate(timeout=30)
    store.close()
    if child.returncode == 99:
        pytest.skip("file systems cannot be remounted here")
    assert (child.returncode, err) == (0, ""), said
    assert said[-2:] == ["fetching a new model", "waiting for work"]
    assert json.loads((home / "status.json").read_text())["status"] == "stopped"
