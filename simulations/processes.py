"""Virtual devices in a pool of processes, each with its own sessions of the plans; replies in the order asked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from pocketfed.coordinator import flwr_compat  # noqa: F401 - first: it silences flwr before flwr is imported

# isort: split
from flwr.app import Error, Message

from pocketfed.client_sdk.errors import TrainingError
from pocketfed.client_sdk.flower_app import kept_of, read_task, reply_message
from pocketfed.client_sdk.outgoing import NOTHING, Kept, UpdateForm
from pocketfed.client_sdk.perform import Reply, Task, perform
from pocketfed.client_sdk.trainer import TrainConfig
from pocketfed.coordinator.grid import FAILED
from pocketfed.coordinator.store import Store
from pocketfed.model.parameters import Vector
from pocketfed.simulations.backends import BackendError
from pocketfed.simulations.grids import DeviceMaterial, InProcessGrid
from pocketfed.simulations.sharing import open_shared, share

AHEAD = 2  # assignments a process holds: one in work, one that waits
LEAD = 32  # replies a process may be ahead of the one that is waited for, times the number of processes


class PoolGrid(InProcessGrid):
    """Devices dealt out to processes, a device always to the same one: what its frozen part made of a text is there.

    What stays on a device stays here, in its context, so that any number of processes gives the same bits.

    Args:
        count: of processes.
    """

    def __init__(
        self, store: Store, run_id: int, devices: Mapping[int, str], material: DeviceMaterial, count: int
    ) -> None:
        super().__init__(store, run_id, material.app(), devices, material.artifact_bytes)
        folder = share(material)
        self._homes = {node: place % count for place, node in enumerate(devices)}
        self._workers = [_Worker(folder) for _ in range(count)]

    def work(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Every process is kept at work, but none runs far ahead: replies take memory."""
        queues: list[deque[int]] = [deque() for _ in self._workers]
        for place, message in enumerate(messages):
            queues[self._homes[message.metadata.dst_node_id]].append(place)
        tasks: dict[int, Task] = {}
        ready: dict[int, Message] = {}
        for place in range(len(messages)):
            while place not in ready:
                for worker, queue in zip(self._workers, queues, strict=True):
                    while queue and len(worker.holds) < AHEAD and queue[0] < place + LEAD * len(queues):
                        at = queue.popleft()
                        tasks[at] = self._send(worker, at, messages[at])
                for worker in self._answered():
                    at, reply = worker.receive()
                    ready[at] = self._message(messages[at], tasks.pop(at), reply)
            yield ready.pop(place)

    def _send(self, worker: _Worker, place: int, message: Message) -> Task:
        name = self.devices[message.metadata.dst_node_id]
        task = read_task(message, name, seeded_noise=True, theta=self._start(message))
        worker.send(place, task, kept_of(self.context_of(message)) or Kept())
        return task

    def _answered(self) -> list[_Worker]:
        connections: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers if worker.holds}
        return [connections[found] for found in wait(list(connections))]

    def _message(self, message: Message, task: Task, reply: Reply | str) -> Message:
        if isinstance(reply, str):
            return Message(Error(FAILED, reply), reply_to=message)
        return reply_message(message, self.context_of(message), task, reply)

    def close(self) -> None:
        super().close()
        for worker in self._workers:
            worker.close()


class _Worker:
    """The near end of a process that trains. holds: the places of what it was sent and has not answered, in order."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, str(folder)), daemon=True)
        self.process.start()
        far.close()
        self.holds: deque[int] = deque()
        self._theta: Vector = NOTHING  # what it holds

    def send(self, place: int, task: Task, kept: Kept) -> None:
        theta = NOTHING if task.theta is self._theta else task.theta
        self._theta = task.theta
        self.holds.append(place)
        with self._alive():
            self.connection.send_bytes(pack_task(dataclasses.replace(task, theta=theta), kept))

    def receive(self) -> tuple[int, Reply | str]:
        with self._alive():
            return self.holds.popleft(), unpack_reply(self.connection.recv_bytes())

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self.process.join(5.0)
            raise BackendError(
                f"a process of the pool ended with {self.process.exitcode}; what it said is above, or it was killed for "
                "memory: use fewer processes"
            ) from None

    def close(self) -> None:
        self.connection.close()  # it reads the end and ends
        self.process.join(5.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


# ---- in the other process ----------------------------------------------------------------------------------------------


def serve(connection: Connection, folder: str) -> None:
    """Answer tasks until the other end hangs up."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    material = open_shared(Path(folder))
    theta: Vector = NOTHING
    while True:
        try:
            task, kept = unpack_task(connection.recv_bytes())
        except (EOFError, KeyboardInterrupt):
            return
        theta = task.theta if task.theta.size else theta
        task = dataclasses.replace(task, theta=theta)
        examples = material.examples.take(material.parts[task.device])
        try:
            reply: Reply | str = perform(material.trainer, task, examples, kept=kept)
        except TrainingError as error:
            reply = f"{type(error).__name__}: {error}"
        except KeyboardInterrupt:
            return
        connection.send_bytes(pack_reply(reply))


# ---- what goes between them --------------------------------------------------------------------------------------------


def _pack(told: Mapping[str, Any], **arrays: NDArray[Any]) -> bytes:
    return bytes(save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {"told": json.dumps(told)}))


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Vector]]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["told"]), load(data)


def pack_task(task: Task, kept: Kept) -> bytes:
    """A task with what stayed on its device; its theta may be empty: that of the task before."""
    told = {k: v for k, v in dataclasses.asdict(task).items() if k not in ("theta", "control")}
    control = {} if task.control is None else {"server_control": task.control}
    return _pack(told, theta=task.theta, **dataclasses.asdict(kept), **control)


def unpack_task(data: bytes) -> tuple[Task, Kept]:
    told, arrays = _unpack(data)
    told |= {"config": TrainConfig(**told["config"]), "form": UpdateForm.from_mapping(told["form"])}
    return Task(theta=arrays["theta"], control=arrays.get("server_control"), **told), _kept(arrays)


def _kept(arrays: Mapping[str, Vector]) -> Kept:
    return Kept(**{field.name: arrays[field.name] for field in dataclasses.fields(Kept)})


def pack_reply(reply: Reply | str) -> bytes:
    """A reply, or why there is none."""
    if isinstance(reply, str):
        return _pack({"failed": reply})
    data = np.frombuffer(reply.data, np.uint8)
    told = {"num_examples": reply.num_examples, "metrics": dict(reply.metrics)}
    return _pack(told, data=data, delta=reply.delta, **dataclasses.asdict(reply.kept))


def unpack_reply(data: bytes) -> Reply | str:
    told, arrays = _unpack(data)
    if "failed" in told:
        return str(told["failed"])
    return Reply(arrays["data"].tobytes(), arrays["delta"], told["num_examples"], told["metrics"], _kept(arrays))
