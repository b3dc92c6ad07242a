"""Who may import whom: the layers of the architecture, read from every import statement, lazy ones too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "protos": (), "model": (), "client_sdk": ("protos", "model.parameters", "model.codecs", "model.runtime"),
    "coordinator": ("protos", "model"),
    "dashboard": ("coordinator.store",), "simulations": ("client_sdk", "coordinator", "model"),
    "cli": ("protos", "model", "client_sdk", "coordinator", "dashboard", "simulations"),
}  # fmt: skip
# Where torch is, a device may train the model itself. Of the dashboard, who logs in and the gated acts go through the
# coordinator's own rules and audit, and a release is judged by the coordinator's own words: none of it is written twice.
MORE_FOR = {
    "client_sdk/torch_trainer.py": ("model",),
    "dashboard/login.py": ("coordinator.operators",),
    "dashboard/acts.py": (
        "coordinator.operators",
        "coordinator.releases",
        "coordinator.rollout",
        "coordinator.signing",
    ),
    "dashboard/queries/models.py": ("coordinator.reports", "coordinator.releases", "coordinator.rollout"),
}
# Packages that only some modules may import, lazily or not; and of those, the ones that must not be at a top.
ONLY_IN = {
    "flwr": ("client_sdk/flower_app.py", "coordinator/flwr_compat.py", "coordinator/strategy.py", "coordinator/strategy_base.py",
             "coordinator/robust.py", "coordinator/lora.py", "coordinator/scaffold.py", "coordinator/grid.py",
             "coordinator/rounds.py", "coordinator/screening.py", "coordinator/strategy_state.py", "simulations/grids.py",
             "simulations/batched.py", "simulations/processes.py", "simulations/flower_ray.py"),
    "streamlit": ("dashboard/",), "altair": ("dashboard/",), "pandas": ("dashboard/",),
    "sqlalchemy": ("coordinator/", "dashboard/"), "alembic": ("coordinator/",),
    "torch": ("model/", "client_sdk/torch_trainer.py", "coordinator/artifacts.py"),
    "onnx": ("model/", "client_sdk/torch_trainer.py"), "tokenizers": ("model/",),
    "executorch": ("model/executorch_export.py", "model/executorch_predict.py"),
    "openvino": ("model/engines.py", "model/exporting.py"), "ray": ("simulations/flower_ray.py",),
    "cryptography": ("coordinator/signing.py", "coordinator/tls.py"), "nacl": ("client_sdk/trust.py", "client_sdk/sealing.py"),
    "onnxruntime": ("model/runtime.py",), "typer": ("cli/",), "rich": ("cli/output.py",),
    "pickle": (), "dill": (), "joblib": (), "marshal": (), "shelve": (), "cloudpickle": (),
}  # fmt: skip
TORCH_AT_TOP = ("model/", "client_sdk/torch_trainer.py")
AT_TOP_ONLY_IN = {
    "torch": TORCH_AT_TOP, "onnx": TORCH_AT_TOP, "tokenizers": (), "executorch": (), "cryptography": (), "nacl": (), "rich": (),
    "openvino": (), "onnxruntime": (), "ray": (),
}  # fmt: skip
NUMPY_ONLY = (
    "model/parameters.py",
    "model/codecs.py",
    "model/runtime.py",
    "model/tasks.py",
    "model/task_files.py",
    "model/task_layouts.py",
    "model/superglue.py",
    "model/metrics.py",
)  # what a device may meet, and what those import


def modules() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for layer in MAY_IMPORT for p in (ROOT / layer).rglob("*.py"))


def imports(path: str, top: bool = False) -> Iterator[str]:
    """Full names of all that a module imports; `top`: of what it imports when it is itself imported."""
    nodes: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; give the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (top and (lazy or type_only)):
            nodes += ast.iter_child_nodes(node)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", modules())
def test_a_module_imports_only_from_the_layers_below_it(path: str) -> None:
    layer = path.split("/")[0]
    allowed = tuple(f"pocketfed.{name}" for name in (layer, *MAY_IMPORT[layer], *MORE_FOR.get(path, ())))
    ours = [name for name in imports(path) if within(name, ("pocketfed",))]
    # `from pocketfed.coordinator import flwr_compat` is an import of the module
    assert [name for name in ours if not within(name, allowed)] == []


@pytest.mark.parametrize("path", modules())
def test_a_package_is_imported_only_where_it_belongs(path: str) -> None:
    for top, rules in ((False, ONLY_IN), (True, AT_TOP_ONLY_IN)):
        for package, places in rules.items():
            found = [name for name in imports(path, top) if within(name, (package,))]
            assert not found or path.startswith(places), f"{path} imports {found[0]}{' at its top' * top}"


@pytest.mark.parametrize("path", NUMPY_ONLY)
def test_what_a_device_may_meet_of_the_model_needs_no_torch(path: str) -> None:
    heavy = [n for n in imports(path) if within(n, ("torch", "onnx", "tokenizers", "pocketfed"))]
    light = tuple(f"pocketfed.{p.removesuffix('.py').replace('/', '.')}" for p in NUMPY_ONLY)
    assert [n for n in heavy if not within(n, light)] == []


def test_the_reader_of_imports_sees_lazy_ones_and_tells_them_from_those_at_the_top(tmp_path: Path) -> None:
    source = "import a\nif x:\n    from b import c\ndef f():\n    import d.e\nclass K:\n    import g\n"
    (tmp_path / "m.py").write_text(source + "if TYPE_CHECKING:\n    import h\n")
    path = str(tmp_path / "m.py")
    assert sorted(imports(path)) == ["a", "b.c", "d.e", "g", "h"]
    assert sorted(imports(path, top=True)) == ["a", "b.c", "g"]


def test_whichever_module_brings_flwr_in_has_switched_its_telemetry_off_before():
    import os
    import subprocess
    import sys

    modules = [
        p for p in ROOT.glob("*/*.py") if "flwr" in p.read_text() and p.parts[-2] not in ("tests", "cli", "benchmarks")
    ]
    names = [f"pocketfed.{p.parts[-2]}.{p.stem}" for p in modules]
    assert "pocketfed.simulations.grids" in names
    code = (
        "import importlib, os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'flwr':\n"
        "            assert os.environ['FLWR_TELEMETRY_ENABLED'] == '0'\n"
        "            assert os.environ['FLWR_DISABLE_UPDATE_CHECK'] == '1'\n"
        "sys.meta_path.insert(0, Watch())\n"
        "importlib.import_module(sys.argv[1])\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    for name in names:
        done = subprocess.run(
            [sys.executable, "-c", code, name], env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (name, done.stderr)
