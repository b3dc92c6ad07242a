"""A run's configuration: from TOML and overrides, whole and in range, or refused by name before anything starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pocketfed.client_sdk import RunDescription, outgoing
from pocketfed.client_sdk.trainer import TrainConfig
from pocketfed.coordinator import config
from pocketfed.coordinator.config import (
    LocalTraining,
    RunConfig,
    RunConfigError,
    UpdateForm,
    apply_overrides,
    load_run_config,
)
from pocketfed.protos import fleet_pb2


def test_local_training_has_the_fields_that_the_wire_and_the_device_have() -> None:
    ours = {f.name: f.default for f in dataclasses.fields(LocalTraining)}
    device = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    wire = {f.name for f in fleet_pb2.TrainConfig.DESCRIPTOR.fields}
    assert {*ours, "seed"} == set(device) == wire
    assert ours | {"seed": 0} == device  # the defaults are the same, too


def test_forms_have_the_fields_that_the_wire_and_the_device_have() -> None:
    ours = {f.name: f.default for f in dataclasses.fields(UpdateForm)}
    assert ours == {f.name: f.default for f in dataclasses.fields(outgoing.UpdateForm)}
    assert set(ours) == {f.name for f in fleet_pb2.UpdateForm.DESCRIPTOR.fields}
    assert config.METRICS == outgoing.METRICS
    described = outgoing.UpdateForm("topk:0.1", 2.0, private=("classifier",), metrics=("loss",))
    assert str(RunDescription(7, "v", "head", described)).endswith(
        f"collects: {UpdateForm('topk:0.1', 2.0, private=['classifier'], metrics=['loss'])}"
    )


def test_a_form_is_read_from_overrides() -> None:
    config = load_run_config(None, ["update.codec=topk:0.01", 'update.private=["classifier"]', "update.metrics=[]"])
    assert config.update == UpdateForm("topk:0.01", private=("classifier",), metrics=())
    assert not config.update.plain
    assert RunConfig().update.plain
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_no_file_and_no_override_are_the_defaults() -> None:
    assert load_run_config(None) == RunConfig()


def test_a_file_and_overrides_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'name = "night"\nrounds = 3\nlease_s = 2\n[local]\nepochs = 2\n[strategy_options]\nproximal_mu = 0.1\n'
    )
    config = load_run_config(
        path, ["rounds=5", "local.learning_rate=1", "strategy=FedProx", "local.optimizer=sgd", "release=false"]
    )
    assert config == RunConfig(
        name="night",
        rounds=5,
        lease_s=2,
        strategy="FedProx",
        strategy_options={"proximal_mu": 0.1},
        release=False,
        local=LocalTraining(epochs=2, learning_rate=1, optimizer="sgd"),
    )


def test_the_resolved_configuration_is_json_and_reads_back_equal() -> None:
    config = RunConfig(strategy="FedProx", strategy_options={"proximal_mu": 0.1}, local=LocalTraining(epochs=3))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_never_change_what_they_are_laid_over() -> None:
    values = {"rounds": 1, "local": {"epochs": 1}}
    merged = apply_overrides(values, ["local.epochs=2", "a.b.c=x y"])
    assert values == {"rounds": 1, "local": {"epochs": 1}}
    assert merged == {"rounds": 1, "local": {"epochs": 2}, "a": {"b": {"c": "x y"}}}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"round": 3}, "there is no setting round; the nearest are rounds, "),
        ({"local": {"epoch": 3}}, r"there is no setting local\.epoch; the nearest are local\.epochs"),
        ({"rounds": "3"}, "rounds is '3'; it must be of type int"),
        ({"rounds": True}, "rounds is True; it must be of type int"),
        ({"rounds": 2.5}, r"rounds is 2\.5; it must be of type int"),
        ({"release": 1}, "release is 1; it must be of type bool"),
        ({"lease_s": True}, "lease_s is True; it must be of type float"),
        ({"name": 7}, "name is 7; it must be of type str"),
        ({"strategy_options": [1]}, r"strategy_options is \[1\]; it must be of type Mapping"),
        ({"local": 3}, "local is 3; it must be a table"),
        ({"local": {"schedule": "step"}}, r"local\.schedule is 'step'; choose constant, linear or cosine"),
        ({"round_schedule": "step"}, "round_schedule is 'step'; choose constant, linear or cosine"),
        ({"local": {"optimizer": "adam"}}, r"local\.optimizer is 'adam'; choose adamw or sgd"),
        ({"rounds": 0}, "rounds is 0; it must be a number between 1 and"),
        ({"seed": -1}, "seed is -1; it must be a number between 0 and"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be a number between 0 and"),
        ({"lease_s": float("nan")}, "lease_s is nan; it must be a number between"),
        ({"lease_s": 0.0}, r"lease_s is 0\.0; it must be a number between 0\.1 and"),
        ({"local": {"batch_size": 0}}, r"local\.batch_size is 0; it must be a number between 1 and 4096"),
        ({"local": {"learning_rate": -0.1}}, r"local\.learning_rate is -0\.1; it must be a number between 0 and 100"),
        ({"name": ""}, "name is ''; it must have 1 to 100 characters"),
        ({"channel": "x" * 101}, "it must have 1 to 100 characters"),
        ({"update": {"codec": "zip"}}, r"update\.codec: there is no codec 'zip'; choose one of float32, float16, int8"),
        ({"update": {"noise": 0.1}}, r"update\.noise is 0\.1 in units of update\.clip_norm, which is 0"),
        ({"update": {"noise": 0.1, "clip_norm": 1.0, "codec": "int8"}}, "would pile up: error feedback carries"),
        ({"update": {"clip_norm": float("nan")}}, r"update\.clip_norm is nan"),
        ({"update": {"private": "classifier"}}, r"update\.private is 'classifier'; it must be a list of names"),
        ({"update": {"metrics": ["acuracy"]}}, r"update\.metrics has 'acuracy'; devices know loss, accuracy"),
        (
            {"update": {"clip_norm": 2.0}, "max_update_norm": 2.0},
            "max_update_norm 2 would quarantine updates that devices",
        ),
        ({"update": {"colour": 1}}, r"there is no setting update\.colour; the nearest are .*update\.codec"),
        ({"cohort": 3, "quorum": 4}, "quorum 4 can never be met by a cohort of 3; lower it"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(RunConfigError, match=says):
        RunConfig.from_dict(values)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.4, 0.2 + 0.1 * 2**0.5, 0.2, 0.2 - 0.1 * 2**0.5]),
    ],
)
def test_the_learning_rate_of_each_round_follows_the_schedule(schedule: str, rates: list[float]) -> None:
    run = RunConfig(rounds=4, round_schedule=schedule, local=LocalTraining(learning_rate=0.4))
    assert [run.learning_rate_in(number) for number in (1, 2, 3, 4)] == pytest.approx(rates, abs=1e-12)


def test_settings_given_in_code_are_checked_as_well() -> None:
    with pytest.raises(RunConfigError, match="rounds is 0"):
        RunConfig(rounds=0)
    with pytest.raises(RunConfigError, match=r"local\.max_length is 2"):
        LocalTraining(max_length=2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rounds", "'rounds' is not of the form name=value"),
        ("=3", "'=3' is not of the form name=value"),
        ("rounds.x=3", "goes into rounds, which is not a table"),
        ("local=3", "local is 3; it must be a table"),
        ("rounds=many", "rounds is 'many'; it must be of type int"),
    ],
)
def test_an_override_that_does_not_fit_is_named(tmp_path: Path, override: str, says: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rounds = 3\n")
    with pytest.raises(RunConfigError, match=says):
        load_run_config(path, [override])


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunConfigError, match=r"cannot read .*no\.toml: No such file or directory; give a TOML file"):
        load_run_config(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(RunConfigError, match=r"bad\.toml is not TOML: .*line 1"):
        load_run_config(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunConfigError, match=r"cannot read .*binary\.toml"):
        load_run_config(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "override", ["deadline_s=inf", "wait_s=inf", "max_update_norm=inf", "local.max_grad_norm=inf", "deadline_s=1e300"]
)
def test_what_neither_a_date_nor_json_can_hold_is_refused(override: str) -> None:
    with pytest.raises(RunConfigError, match="must be a number between"):
        load_run_config(None, [override])
