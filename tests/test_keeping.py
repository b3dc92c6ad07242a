"""What a device keeps between rounds: counted once, wherever the process ends, and given up where it does not fit."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.keeping import Keeping, Part
from pocketfed.client_sdk.link import Unreachable
from pocketfed.client_sdk.outgoing import NOTHING, Kept, UpdateForm
from pocketfed.client_sdk.perform import Reply
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.model.parameters import Vector

FORM = UpdateForm("int8", private=("classifier.bias",))


@pytest.fixture(scope="module")
def trainer(nano_artifact: Artifact) -> PlanTrainer:
    return PlanTrainer(nano_artifact, "head")


class Coordinator:
    """What it answers when asked whether an update was taken, and how often it was asked."""

    def __init__(self, answer: bool | None = True) -> None:
        self.answer, self.asked = answer, 0

    def __call__(self, assignment: str) -> bool | None:
        self.asked += 1
        return self.answer


def part(trainer: PlanTrainer, number: int, run: int = 1, form: UpdateForm = FORM, start: Vector | None = None) -> Part:
    theta = trainer.initial_theta() if start is None else start
    return Part(f"{run}-{number}-1-1-train", f"digest {number}", run, form, theta)


def reply(trainer: PlanTrainer, number: float) -> Reply:
    residual = np.full(trainer.size - 4, number, np.float32)
    return Reply(b"bytes %d" % number, NOTHING, 5, {"loss": number}, Kept(residual, np.full(4, number, np.float32)))


def residual_of(kept: Kept) -> float | None:
    return float(kept.residual[0]) if kept.residual.size else None


def private_of(kept: Kept) -> float | None:
    return float(kept.private[0]) if kept.private.size else None


def test_what_was_taken_is_there_for_the_next_round_and_in_a_new_process(trainer: PlanTrainer, tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, Coordinator())
    assert residual_of(keeping.before(trainer, part(trainer, 1))) is None
    keeping.hold(trainer, part(trainer, 1), reply(trainer, 1))
    keeping.settle(part(trainer, 1).assignment, taken=True)
    for again in (keeping, Keeping(tmp_path, Coordinator())):
        kept = again.before(trainer, part(trainer, 2))
        assert (residual_of(kept), private_of(kept)) == (1.0, 1.0)
    for file in ("kept.safetensors", "outgoing.safetensors"):
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o600


@pytest.mark.parametrize(("answer", "residual", "private"), [(True, 2.0, 2.0), (False, 1.0, 1.0), (None, None, 1.0)])
def test_a_process_that_ends_before_its_receipt_asks_and_counts_once(
    trainer: PlanTrainer, tmp_path: Path, answer: bool | None, residual: float | None, private: float
) -> None:
    """None: the coordinator has forgotten. In doubt a residual is not sent twice."""
    first = Keeping(tmp_path, Coordinator())
    first.hold(trainer, part(trainer, 1), reply(trainer, 1))
    first.settle(part(trainer, 1).assignment, taken=True)
    first.hold(trainer, part(trainer, 2), reply(trainer, 2))  # and killed before the receipt
    asked = Coordinator(answer)
    for _ in range(2):
        kept = Keeping(tmp_path, asked).before(trainer, part(trainer, 3))
        assert (residual_of(kept), private_of(kept)) == (residual, private)


def test_the_same_assignment_gets_the_same_bytes_and_not_the_residual_twice(
    trainer: PlanTrainer, tmp_path: Path
) -> None:
    first = Keeping(tmp_path, Coordinator())
    first.hold(trainer, part(trainer, 1), reply(trainer, 1))
    found = Keeping(tmp_path, Coordinator()).reply(part(trainer, 1))
    assert found is not None
    assert (found.data, found.num_examples, found.metrics) == (b"bytes 1", 5, {"loss": 1})
    first.settle(part(trainer, 1).assignment, taken=True)
    lost = first.reply(part(trainer, 1))  # the coordinator's spool was lost: it asks for the same again
    assert lost is not None
    assert lost.data == b"bytes 1"
    assert first.reply(part(trainer, 2)) is None
    other = Part(part(trainer, 1).assignment, "other parameters", 1, FORM, trainer.initial_theta())
    assert first.reply(other) is None, "another coordinator's, under the same number"


def test_a_refused_update_leaves_no_trace(trainer: PlanTrainer, tmp_path: Path) -> None:
    asked = Coordinator()
    keeping = Keeping(tmp_path, asked)
    keeping.hold(trainer, part(trainer, 1), reply(trainer, 1))
    keeping.settle(part(trainer, 1).assignment, taken=False)
    kept = keeping.before(trainer, part(trainer, 2))
    assert (residual_of(kept), private_of(kept), asked.asked) == (None, None, 0)


def test_nothing_is_assumed_while_the_coordinator_is_away(trainer: PlanTrainer, tmp_path: Path) -> None:
    def away(_: str) -> bool | None:
        raise Unreachable("nobody answers")

    Keeping(tmp_path, away).hold(trainer, part(trainer, 1), reply(trainer, 1))
    with pytest.raises(Unreachable):
        Keeping(tmp_path, away).before(trainer, part(trainer, 2))
    assert residual_of(Keeping(tmp_path, Coordinator()).before(trainer, part(trainer, 2))) == 1.0


def test_a_residual_is_its_runs_and_private_parameters_are_the_devices(trainer: PlanTrainer, tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, Coordinator())
    keeping.hold(trainer, part(trainer, 1), reply(trainer, 1))
    keeping.settle(part(trainer, 1).assignment, taken=True)
    other_run = keeping.before(trainer, part(trainer, 1, run=2))
    assert (residual_of(other_run), private_of(other_run)) == (None, 1.0)
    other_codec = keeping.before(trainer, part(trainer, 2, form=UpdateForm("topk:0.1", private=FORM.private)))
    assert (residual_of(other_codec), private_of(other_codec)) == (None, 1.0)
    nothing_private = keeping.before(trainer, part(trainer, 2, form=UpdateForm("int8")))
    assert (residual_of(nothing_private), private_of(nothing_private)) == (None, None)
    moved = trainer.initial_theta() + np.float32(1)
    assert private_of(keeping.before(trainer, part(trainer, 2, start=moved))) is None
    assert len(list(tmp_path.iterdir())) == 3, "however many runs: three files"


def test_predictions_use_the_devices_own_parameters_where_they_fit(trainer: PlanTrainer, tmp_path: Path) -> None:
    keeping, theta = Keeping(tmp_path, Coordinator()), trainer.initial_theta()
    assert keeping.personal(trainer, theta) is theta
    keeping.hold(trainer, part(trainer, 1), reply(trainer, 7))
    assert keeping.personal(trainer, theta) is theta, "not before it was taken"
    keeping.settle(part(trainer, 1).assignment, taken=True)
    trained = theta + np.float32(0.5)
    trained[-4:] = theta[-4:]  # a run leaves private places as they were
    own = keeping.personal(trainer, trained)
    assert own[-4:].tolist() == [7.0] * 4
    np.testing.assert_array_equal(own[:-4], trained[:-4])
    assert keeping.personal(trainer, theta + np.float32(1))[-1] != 7.0, "another head has taken its place"


@pytest.mark.parametrize("file", ["kept.safetensors", "outgoing.safetensors"])
def test_a_file_that_lost_a_bit_counts_as_none(trainer: PlanTrainer, tmp_path: Path, file: str) -> None:
    keeping = Keeping(tmp_path, Coordinator())
    keeping.hold(trainer, part(trainer, 1), reply(trainer, 1))
    keeping.settle(part(trainer, 1).assignment, taken=True)
    data = bytearray((tmp_path / file).read_bytes())
    data[-1] ^= 1
    (tmp_path / file).write_bytes(data)
    assert keeping.reply(part(trainer, 1)) is None or file == "kept.safetensors"
    kept = Keeping(tmp_path, Coordinator(False)).before(trainer, part(trainer, 2))
    assert residual_of(kept) == (None if file == "kept.safetensors" else 1.0)


def test_a_plain_form_writes_nothing(trainer: PlanTrainer, tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, Coordinator())
    plain = part(trainer, 1, form=UpdateForm("float16"))
    keeping.hold(trainer, plain, reply(trainer, 1))
    keeping.settle(plain.assignment, taken=True)
    assert list(tmp_path.iterdir()) == []


def test_private_parameters_outlast_a_run_that_has_none(trainer: PlanTrainer, tmp_path: Path) -> None:
    keeping = Keeping(tmp_path, Coordinator())
    own, theta = part(trainer, 1), trainer.initial_theta()
    plain = part(trainer, 1, run=2, form=UpdateForm("int8"))
    for made, number in ((own, 1), (plain, 2)):
        keeping.hold(trainer, made, reply(trainer, number))
        keeping.settle(made.assignment, taken=True)
    assert private_of(keeping.before(trainer, part(trainer, 3))) == 1.0
    assert not np.array_equal(keeping.personal(trainer, theta), theta)
    keeping.forget()
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(keeping.personal(trainer, theta), theta)
