"""The fleet's grid with many answers: read from the store in bunches, in order, each with what its device sent."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from pocketfed.coordinator import grid as module
from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.grid import FAILED, Cohort, FleetGrid
from pocketfed.coordinator.store import Artifact, Assignment, Run, Store, Update, device_named
from pocketfed.coordinator.strategy import THETA
from pocketfed.model.parameters import encode_vector

DEVICES = 11
SIZE = 5


@pytest.fixture
def grid(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetGrid]:
    """A run of one round in which everybody was asked and has answered: device i with i's everywhere, the last gave up."""
    monkeypatch.setattr(module, "ROWS", 4)
    store = Store(database)
    with store.write() as session:
        session.add(Artifact(version="v", manifest={"trainable_sets": {"full": {"size": SIZE}}}, bytes=0))
        session.flush()
        run = Run(name="r", channel="stable", config={}, artifact_version="v", trainable_set="full", seed=0)
        run.rounds_planned = 1
        session.add(run)
        session.flush()
        nodes = {device_named(session, f"d{i:04}").id: f"d{i:04}" for i in range(DEVICES)}
        made = FleetGrid(Assignments(store, tmp_path / "spool"), run.id, dict, SIZE, 600.0)
    made.enter(Cohort(1, 1, nodes))
    arrays = ArrayRecord({THETA: Array(np.ones(SIZE, np.float32))})
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    ids = made.push_messages(Message(content, node, MessageType.TRAIN) for node in nodes)
    with store.write() as session:
        for i, row in enumerate(session.get_one(Assignment, row_id) for row_id in ids):
            row.status = "accepted"
            session.flush()
            if i == DEVICES - 1:
                row.status, row.error = "failed", "no room"
                continue
            data = encode_vector("delta", np.full(SIZE, i, np.float32))
            made.assignments.upload_path(row.id).write_bytes(data)
            row.status = "uploaded"
            session.add(
                Update(
                    assignment_id=row.id,
                    num_examples=i + 1,
                    bytes=len(data),
                    digest=sha256(data).hexdigest(),
                    metrics={},
                )
            )
    yield made
    store.close()


def test_answers_are_read_in_bunches_and_come_in_the_order_of_the_names(grid: FleetGrid) -> None:
    asked: list[str] = []
    with grid.store.read() as session:
        sa.event.listen(session.get_bind(), "before_cursor_execute", lambda *given: asked.append(given[2]))
    replies = list(grid.replies(dict(grid._sent)))
    assert [reply.metadata.reply_to_message_id for reply in replies] == list(grid._sent)
    assert sum("LEFT OUTER JOIN updates" in statement for statement in asked) == 3  # 4, 4 and 3
    assert len([statement for statement in asked if statement.startswith("SELECT")]) < 8
    for i, reply in enumerate(replies[:-1]):
        assert reply.content["metrics"]["num-examples"] == i + 1
        assert reply.content["arrays"][THETA].numpy().tolist() == [i + 1.0] * SIZE  # 1 and the difference
    assert (replies[-1].error.code, replies[-1].error.reason) == (FAILED, "no room")


def test_what_all_start_from_is_decoded_once_and_anew_when_the_same_record_holds_something_else(
    grid: FleetGrid,
) -> None:
    replies = list(grid.replies(dict(grid._sent)))
    starts = {id(reply.content["arrays"][THETA].start) for reply in replies[:-1]}
    assert len(starts) == 1
    first = next(iter(grid._sent.values()))
    first.content["arrays"][THETA] = Array(np.zeros(SIZE, np.float32))
    first.content["config"]["server-round"] = 2
    grid.enter(Cohort(2, 1, {first.metadata.dst_node_id: "d0000"}))
    grid.push_messages([Message(first.content, first.metadata.dst_node_id, MessageType.TRAIN)])
    assert grid._theta.tolist() == [0.0] * SIZE
