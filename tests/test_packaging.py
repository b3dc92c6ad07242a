"""What is installed, and what it weighs: packages, stubs, and a device's install without the coordinator's needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pocketfed.coordinator.artifacts import BuiltArtifact
    from pocketfed.model.tasks import Dataset

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
HEAVY = (
    "torch",
    "flwr",
    "sqlalchemy",
    "alembic",
    "streamlit",
    "ray",
    "pandas",
    "tokenizers",
    "onnx",
    "transformers",
    "cryptography",
)
COMMANDS_ONLY = ("typer", "click", "rich", "pygments")  # for what an operator types, not for a device
NO_INDEX = re.compile(r"No matching distribution|Could not find a version|ConnectionError|timed out")
HELP_SECONDS = 0.5
DEVICE_MEGABYTES = 200  # of 10^6 bytes, on disk; site-packages without what a virtual environment has anyway
OF_THE_ENVIRONMENT = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")


def folders() -> list[Path]:
    """Every folder that is a package, relative to the root."""
    tops = [p.parent for p in ROOT.glob("*/__init__.py")]
    return sorted(p.parent.relative_to(ROOT) for top in tops for p in top.rglob("__init__.py"))


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after `code` ran in a fresh interpreter."""
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr)"
    done = run(sys.executable, "-c", f"{code}\n{report}", cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


# ---- the package list -----------------------------------------------------------------------------------------------


def test_every_folder_with_an_init_is_a_package_of_the_distribution_and_no_other() -> None:
    names = {"pocketfed." + ".".join(folder.parts): str(folder) for folder in folders()}
    assert sorted(SETUPTOOLS["packages"]) == sorted(names)
    assert SETUPTOOLS["package-dir"] == names


def test_every_layer_says_that_it_is_typed() -> None:
    tops = {folder.parts[0] for folder in folders()}
    assert tops == {"protos", "model", "client_sdk", "coordinator", "dashboard", "simulations", "cli"}
    assert [top for top in sorted(tops) if not (ROOT / top / "py.typed").is_file()] == []


def test_the_command_and_the_extras_are_those_that_error_messages_name() -> None:
    from pocketfed.cli.main import EXTRAS

    assert PROJECT["project"]["scripts"] == {"pocketfed": "pocketfed.cli.main:main"}
    assert set(EXTRAS.values()) <= set(PROJECT["project"]["optional-dependencies"])


# ---- stubs -----------------------------------------------------------------------------------------------------------


def test_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    assert version("grpcio-tools") == "1.73.1", "stubs are made with grpcio-tools 1.73.1; pip install -e '.[dev]'"
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "protos").glob("*.proto"))
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    done = run(sys.executable, "-m", "grpc_tools.protoc", "-Ipocketfed/protos=protos", *outs, *sources)
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_text() for p in (tmp_path / "pocketfed" / "protos").iterdir()}
    committed = {p.name: p.read_text() for p in (ROOT / "protos").glob("*_pb2*.py*")}
    assert len(made) == 3 * len(sources) == 6
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == [], "run `make stubs`"


# ---- weight ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["import pocketfed.client_sdk", "from pocketfed.client_sdk import Device"])
def test_the_sdk_loads_nothing_of_the_coordinator(code: str) -> None:
    loaded = loaded_by(code)
    assert "pocketfed" in loaded
    assert loaded.isdisjoint({*HEAVY, *COMMANDS_ONLY, "nacl"})  # the latter comes with the first signature


def test_importing_the_sdk_loads_no_dependency_before_it_is_needed() -> None:
    assert loaded_by("import pocketfed.client_sdk").isdisjoint(
        {"numpy", "grpc", "google", "onnxruntime", "asyncio", "ssl"}
    )
    assert "onnxruntime" not in loaded_by("from pocketfed.client_sdk import Device")


def test_the_device_command_needs_none_of_what_the_other_commands_do() -> None:
    code = "import sys\nfrom pocketfed.cli.main import main\nsys.argv = ['pocketfed', 'device', '--help']\n"
    loaded = loaded_by(code + "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0")
    assert loaded.isdisjoint({*HEAVY, *COMMANDS_ONLY, "numpy", "grpc", "onnxruntime"})


def test_help_loads_neither_numpy_nor_anything_heavier() -> None:
    code = "import sys\nfrom pocketfed.cli.main import main\nsys.argv = ['pocketfed', '--help']\n"
    loaded = loaded_by(code + "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0")
    assert loaded.isdisjoint({*HEAVY, "numpy", "grpc", "onnxruntime"})


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    times = []
    for _ in range(2):  # the first one may have to write bytecode
        with subprocess.Popen([sys.executable, "-m", "pocketfed.cli", "--help"], stdout=subprocess.DEVNULL) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert times[-1] < HELP_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_base_dependency_has_a_wheel_for_linux_on_arm64(python: str, tmp_path: Path) -> None:
    glibc = [word for minor in (17, 26, 27, 28) for word in ("--platform", f"manylinux_2_{minor}_aarch64")]
    done = run(
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--target", tmp_path / "none",
        "--python-version", python, "--implementation", "cp", "--only-binary=:all:", *glibc,
        "--platform", "manylinux2014_aarch64", "--report", tmp_path / "report.json", *PROJECT["project"]["dependencies"],
    )  # fmt: skip
    if done.returncode:
        index = run(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path / "x86", "packaging"
        )
        if index.returncode:
            pytest.skip(f"pip has no package index here: {index.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    wheels = [
        entry["download_info"]["url"].rsplit("/", 1)[-1]
        for entry in json.loads((tmp_path / "report.json").read_text())["install"]
    ]
    assert [name for name in wheels if not name.endswith(("aarch64.whl", "-none-any.whl"))] == []
    assert len(wheels) >= len(PROJECT["project"]["dependencies"])


# ---- a device's install ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def device_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with `pip install .`, from a copy without anything that was built before."""
    base = tmp_path_factory.mktemp("device")
    source, venv = base / "source", base / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for top in {folder.parts[0] for folder in folders()}:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    assert run(sys.executable, "-m", "venv", venv).returncode == 0
    done = run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", source)
    if done.returncode != 0:
        if NO_INDEX.search(done.stderr):
            pytest.skip(f"pip has no package index here: {done.stderr.strip().splitlines()[-1]}")
        pytest.fail(f"pip install . failed:\n{done.stderr[-3000:]}")
    return venv


@pytest.mark.slow
def test_a_device_installs_nothing_of_the_coordinator(device_venv: Path) -> None:
    listed = json.loads(run(device_venv / "bin" / "python", "-m", "pip", "list", "--format", "json").stdout)
    names = {entry["name"].lower() for entry in listed}
    assert {"pocketfed", "grpcio", "onnxruntime"} <= names
    assert names.isdisjoint({*HEAVY, *COMMANDS_ONLY})


@pytest.mark.slow
def test_a_device_install_takes_at_most_200_megabytes_of_disk_beside_the_shipped_student(device_venv: Path) -> None:
    site = next(device_venv.glob("lib/python3*/site-packages"))

    def megabytes(entry: Path) -> float:
        return sum(p.lstat().st_blocks * 512 for p in [entry, *entry.rglob("*")]) / 1e6

    sizes = {entry.name: megabytes(entry) for entry in site.iterdir() if not entry.name.startswith(OF_THE_ENVIRONMENT)}
    student = megabytes(site / "pocketfed" / "model" / "students")
    assert student < 8
    sizes["pocketfed"] -= student
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:10]
    total = f"{sum(sizes.values()):.1f} MB: " + ", ".join(f"{name} {mb:.1f}" for name, mb in largest)
    print(f"\ndevice install: {total}")
    assert sizes["onnxruntime"] > 1, "nothing was measured"
    assert sum(sizes.values()) <= DEVICE_MEGABYTES, total


@pytest.mark.slow
def test_a_host_app_is_type_checked_against_the_installed_packages(device_venv: Path, tmp_path: Path) -> None:
    layers = next(device_venv.glob("lib/python3*/site-packages/pocketfed"))
    assert sorted(p.parent.name for p in layers.glob("*/py.typed")) == sorted({f.parts[0] for f in folders()})
    app = tmp_path / "app.py"
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", device_venv / "bin" / "python", app)
    app.write_text(
        "from pocketfed.client_sdk import Device\n\n"
        "with Device('127.0.0.1:1', home='home') as device:\n"
        "    label: str = device.predict('play jazz').label\n"
    )
    done = run(*mypy, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    app.write_text(app.read_text() + "    number: int = device.predict('play jazz').label\n")
    done = run(*mypy, cwd=tmp_path)
    assert 'variable has type "int"' in done.stdout


@pytest.mark.slow
def test_a_device_can_use_the_sdk_and_is_told_what_other_commands_need(device_venv: Path, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        "from pocketfed.client_sdk import Device\n"
        "with Device('127.0.0.1:1', home='home') as device:\n"
        "    print(device.add_examples([('play jazz', 'music')]).added, device.status())\n"
    )
    done = run(device_venv / "bin" / "python", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 not started\n", "")
    command = device_venv / "bin" / "pocketfed"
    shown = run(command, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "  device  Be a device" in shown.stdout
    assert "  pip install 'pocketfed[simulation]'  simulate, demo" in shown.stdout
    told = run(command, "simulate", "--data", "x.csv", cwd=tmp_path)
    assert (told.returncode, told.stderr) == (
        1, "pocketfed: simulate needs typer, which is not installed; run: pip install 'pocketfed[simulation]'\n")  # fmt: skip
    told = run(command, "devcie", cwd=tmp_path)
    assert (told.returncode, told.stderr) == (2, "pocketfed: there is no command 'devcie' here; see pocketfed --help\n")


@pytest.mark.slow
def test_the_device_command_takes_part_in_a_run_on_base_dependencies_alone(
    device_venv: Path, tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset
) -> None:
    from pocketfed.coordinator.artifacts import publish_artifact
    from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
    from pocketfed.coordinator.signing import ensure_keys
    from pocketfed.coordinator.store import Store

    rows = "".join(json.dumps({"text": e.text, "label": e.label}) + "\n" for e in tiny_dataset.train[:8])
    (tmp_path / "mine.jsonl").write_text(rows)
    store = Store(str(tmp_path / "fleet.db"))
    with store.write() as session:  # signed: the device's Ed25519 is not the coordinator's
        publish_artifact(session, nano_built, "stable", "head", ensure_keys(session, tmp_path / "keys"))
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server:
        words = ("device", "--coordinator", f"127.0.0.1:{server.port}", "--data", "mine.jsonl", "--home", "home")
        with subprocess.Popen(
            [device_venv / "bin" / "pocketfed", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            said = [next(child.stdout).strip() for _ in range(5)]
            child.terminate()
            assert child.wait(20) == 0
    store.close()
    assert said[0].endswith(": 8 labelled examples")
    assert said[1:] == ["enrolling", "waiting for work", "fetching a new model", "waiting for work"]
    assert (
        json.loads((tmp_path / "home" / "trust.json").read_text())["in_use"]["stable"]["version"] == nano_built.version
    )
