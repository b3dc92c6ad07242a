"""Other people's trackers are told of every round, through their own libraries, where these are installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pocketfed.coordinator.progress import RoundResult
from pocketfed.simulations.trackers import TrackerError, numbers_of, trackers

SETTINGS = {"rounds": 2, "local": {"epochs": 1}}


def test_a_rounds_numbers_are_those_it_has() -> None:
    result = RoundResult(3, "finished", 0.5, None, 0.25, 4, 1, 10, 20, 1.5, "late")
    told = {
        "accuracy": 0.5,
        "train_loss": 0.25,
        "devices": 4,
        "failed": 1,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": 1.5,
    }
    assert numbers_of(result) == told


def test_tensorboard_has_every_rounds_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not here: the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with trackers([f"tensorboard:{tmp_path / 'a'}", f"tensorboard:{tmp_path / 'b'}"], "run", SETTINGS) as log:
        for step, accuracy in enumerate((0.25, 0.5, float("nan"))):
            log(step, {"accuracy": accuracy})
    for name in "ab":
        events = EventAccumulator(str(tmp_path / name), size_guidance={"tensors": 0}).Reload()
        assert [event.step for event in events.Tensors("accuracy")] == [0, 1]


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_has_settings_rounds_and_how_it_ended(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not here: the extra mlflow")
    uri = f"sqlite:///{tmp_path / 'ml.db'}"
    with trackers([f"mlflow:{uri}"], "run", SETTINGS) as log:
        log(1, {"accuracy": 0.5, "line/central": 0.75})
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("pocketfed").experiment_id])
    assert run.data.params == {"rounds": "2", "local.epochs": "1"}
    assert run.data.metrics == {"accuracy": 0.5, "line/central": 0.75}
    assert run.info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_is_told_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not here: the extra wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with trackers(["wandb:pocketfed"], "run", SETTINGS) as log:
        log(1, {"accuracy": 0.5})
    wandb.teardown()  # waits for what writes its files
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"accuracy" in file.read_bytes()


@pytest.mark.parametrize("spec", ["tensorboard", "tensorboard:", "csv:here", ""])
def test_what_is_no_tracker_is_refused(spec: str) -> None:
    with (
        pytest.raises(TrackerError, match="is no tracker; give tensorboard:DIR, mlflow:URI or wandb:PROJECT"),
        trackers([spec], "run", {}),
    ):
        pass


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow", "wandb"])
def test_a_library_that_is_missing_is_named_with_its_extra(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (kind, f"{kind}.summary"):
        monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(TrackerError, match=rf"{kind} is not installed; run: pip install 'pocketfed\[{kind}\]'"),
        trackers([f"{kind}:here"], "run", {}),
    ):
        pass
