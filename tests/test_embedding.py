"""A guest in the host app: what the SDK does to the process it lives in, over a device's whole life."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pocketfed.coordinator.artifacts import BuiltArtifact
    from pocketfed.model.tasks import Dataset

ROOT = Path(__file__).resolve().parents[1]
LIFE = Path(__file__).with_name("host_app.py")
HEAVY = {"torch", "flwr", "sqlalchemy", "alembic", "streamlit", "ray", "pandas", "tokenizers", "onnx", "typer", "rich"}
# The SDK's own modules; flower_app is imported where Flower runs, torch_trainer where torch is.
MODULES = sorted(p for p in (ROOT / "client_sdk").glob("*.py") if p.name not in ("flower_app.py", "torch_trainer.py"))
NEVER = ("signal", "atexit", "subprocess", "multiprocessing", "faulthandler", "tempfile")
NEVER_CALLED = (
    "print", "sys.exit", "exit", "quit", "os._exit", "os.fork", "os.system", "os.kill", "os.chdir", "os.umask", "os.putenv",
    "logging.basicConfig", "warnings.filterwarnings", "warnings.simplefilter", "locale.setlocale", "sys.setrecursionlimit",
    "socket.setdefaulttimeout", "np.seterr", "np.random.seed", "random.seed", "gc.disable", "gc.freeze",
)  # fmt: skip


@pytest.mark.parametrize("module", [p.name for p in MODULES])
def test_no_module_of_the_sdk_calls_what_belongs_to_the_host(module: str) -> None:
    tree = ast.parse((ROOT / "client_sdk" / module).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported.isdisjoint(NEVER)
    assert {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}.isdisjoint(NEVER_CALLED)
    raised = {ast.unparse(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc}
    assert not [name for name in raised if name.startswith(("SystemExit", "KeyboardInterrupt"))]


@pytest.fixture(scope="module")
def life(
    tmp_path_factory: pytest.TempPathFactory, nano_built: BuiltArtifact, tiny_dataset: Dataset
) -> tuple[dict[str, Any], Path]:
    """What a host app saw that enrolled a device, predicted, trained a round, handed it in and closed; and its folder."""
    from pocketfed.client_sdk.trainer import TrainConfig
    from pocketfed.coordinator.artifacts import publish_artifact
    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.grid import FleetGrid
    from pocketfed.coordinator.progress import create_run, starting_theta
    from pocketfed.coordinator.rounds import drive_run
    from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
    from pocketfed.coordinator.signing import ensure_keys
    from pocketfed.coordinator.store import Assignment, Store

    folder = tmp_path_factory.mktemp("host")
    for name in ("home", "elsewhere"):
        (folder / name).mkdir()
    (folder / "examples.json").write_text(json.dumps([[e.text, e.label] for e in tiny_dataset.train[:16]]))
    store = Store(str(folder / "fleet.db"))
    with store.write() as session:
        publish_artifact(session, nano_built, "stable", "head", ensure_keys(session, folder / "keys"))
    with CoordinatorServer(store, ServerConfig("127.0.0.1:0")) as server:
        config = RunConfig(name="one", rounds=1, min_devices=1, local=TrainConfig(epochs=1, batch_size=4))
        run_id = create_run(store, config)
        _, size = starting_theta(store, run_id)
        grid = FleetGrid(server.assignments, run_id, lambda: server.online("stable"), size, 10.0)
        driver = threading.Thread(target=drive_run, args=(store, run_id, grid, config), daemon=True)
        driver.start()
        elsewhere = str(folder / "elsewhere")  # what a program writes without being told where
        # A machine of its own: neither the suite's silencing of telemetry, nor what counts as one that builds software.
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "OMP_NUM_THREADS")}
        done = subprocess.run(
            [sys.executable, "-B", str(LIFE), f"127.0.0.1:{server.port}", str(folder / "home"), str(folder / "examples.json")],
            cwd=elsewhere, capture_output=True, text=True, timeout=120, check=False,
            env=environment | {"HOME": elsewhere, "TMPDIR": elsewhere},
        )  # fmt: skip
        driver.join(60)
        with store.read() as session:
            (assignment,) = session.query(Assignment).all()
            assert assignment.status == "aggregated", assignment.error
    store.close()
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report | {"stdout": done.stdout, "stderr": done.stderr}, folder


def test_the_life_that_is_watched_is_a_whole_one(life: tuple[dict[str, Any], Path]) -> None:
    report, folder = life
    assert report["label"] in ("alarm", "lights", "music", "weather")
    assert "handed in" in report["said"]
    assert (folder / "home" / "trust.json").exists()  # a signature was checked


def test_nothing_is_written_outside_home(life: tuple[dict[str, Any], Path]) -> None:
    report, folder = life
    home = str(folder / "home")
    written = {path for path in report["written"] if not path.startswith("/proc/self/")}
    assert [path for path in written if path.startswith(home)], "nothing was watched"
    assert [path for path in sorted(written) if path != home and not path.startswith(home + "/")] == []
    assert list((folder / "elsewhere").iterdir()) == []  # not by C code either, which no audit hook sees
    assert [f for f in report["held_open"] if not f.startswith((home + "/", "/dev/", "/proc/"))] == []
    readable = [p for p in (folder / "home").iterdir() if p.is_file() and p.stat().st_mode & 0o022]
    assert readable == []  # nobody else may write there


def test_no_process_is_started_and_nothing_ends_the_host(life: tuple[dict[str, Any], Path]) -> None:
    report, _ = life
    assert report["processes"] == []
    assert report["exits"] == []


def test_signal_handlers_warnings_and_limits_are_the_hosts(life: tuple[dict[str, Any], Path]) -> None:
    report, _ = life
    assert report["after"] == report["before"]
    assert report["before"]["signals"]["SIGTERM"]


def test_the_sdk_prints_nothing_and_logs_only_to_whom_listens(life: tuple[dict[str, Any], Path]) -> None:
    report, _ = life
    assert report["stderr"] == ""
    assert report["stdout"].count("\n") == 1  # the host's own report
    assert report["root_handlers"] == []
    assert report["handlers"] == ["NullHandler"]


def test_heavy_packages_are_not_loaded_in_a_whole_life(life: tuple[dict[str, Any], Path]) -> None:
    report, _ = life
    assert HEAVY.isdisjoint(report["modules"])
    assert {"onnxruntime", "grpc", "nacl"} <= set(report["modules"])


def test_its_threads_end_when_the_device_is_closed(life: tuple[dict[str, Any], Path]) -> None:
    report, _ = life
    assert report["threads"] == ["MainThread"]


def test_a_null_handler_is_there_as_soon_as_the_sdk_is() -> None:
    import pocketfed.client_sdk

    assert pocketfed.client_sdk.__all__
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("pocketfed").handlers)


@pytest.mark.parametrize("given", [{}, {"ORT_DISABLE_TELEMETRY": "1"}])
def test_onnx_runtime_is_silenced_and_the_environment_is_as_it_was(given: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import os; before = dict(os.environ)\n"
        "from pocketfed.model.runtime import load_onnxruntime\n"
        "assert load_onnxruntime() is load_onnxruntime(); assert dict(os.environ) == before"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env=environment | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []  # no id of the device, no cache of events


def test_who_asks_for_telemetry_in_the_environment_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketfed.model import runtime

    seen: dict[str, str | None] = {}

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "onnxruntime":
                seen.update({variable: os.environ.get(variable) for variable in runtime.SILENCE})

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder()])  # and nothing that would find it
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("ORT_TELEMETRY_DISABLED", raising=False)
    with pytest.raises(ModuleNotFoundError):
        runtime.load_onnxruntime()
    assert seen == {"ORT_DISABLE_TELEMETRY": "0", "ORT_TELEMETRY_DISABLED": "1"}
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert "ORT_TELEMETRY_DISABLED" not in os.environ
