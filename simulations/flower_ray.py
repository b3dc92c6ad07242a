"""Virtual devices on Ray, by Flower's own simulation backend: for fleets that one machine does not hold."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pocketfed.coordinator import flwr_compat

# isort: split
from flwr.app import Context, Message

from pocketfed.coordinator.store import Store
from pocketfed.simulations.backends import BackendError
from pocketfed.simulations.grids import DeviceMaterial, InProcessGrid, answer_of
from pocketfed.simulations.sharing import open_shared, share

TRIES = 3
AHEAD = 2  # messages under way, times the number of actors


class RayGrid(InProcessGrid):
    """The same ClientApp in Ray's actors, one processor each. What stays on a device comes back in its context.

    A Ray cluster that is running already (RAY_ADDRESS) is joined; then `count` is its own, and all of its machines must see
    the scratch folder and the artifact under the same path.
    """

    def __init__(
        self, store: Store, run_id: int, devices: Mapping[int, str], material: DeviceMaterial, count: int
    ) -> None:
        super().__init__(store, run_id, material.app(), devices, material.artifact_bytes)
        self._backend = start_backend(count)
        folder = str(share(material))
        self._backend.build(partial(open_app, folder))
        self._threads = ThreadPoolExecutor(max(1, self._backend.num_workers))
        self._partitions = {node: place for place, node in enumerate(devices)}

    def context_of(self, message: Message) -> Context:
        context = super().context_of(message)
        context.node_config.setdefault("partition-id", self._partitions[message.metadata.dst_node_id])
        return context

    def work(self, messages: Sequence[Message]) -> Iterator[Message]:
        """As many as there are actors are under way: Flower's backend waits for each in a thread of its own."""
        under_way: list[tuple[int, Future[Any]]] = []
        left = iter(messages)
        while True:
            while len(under_way) < AHEAD * self._backend.num_workers and (message := next(left, None)) is not None:
                asked = self._threads.submit(self._backend.process_message, message, self.context_of(message))
                under_way.append((message.metadata.dst_node_id, asked))
            if not under_way:
                return
            node, asked = under_way.pop(0)
            reply, self._contexts[node] = asked.result()
            yield reply

    def close(self) -> None:
        super().close()
        self._threads.shutdown(cancel_futures=True)
        self._backend.terminate()


def start_backend(count: int) -> Any:
    """Flower's backend with `count` actors on this machine, or those of a running cluster.

    Raises:
        BackendError: Ray did not start.
    """
    start_ray(count)
    return flwr_compat.ray_backend({"client_resources": {"num_cpus": 1, "num_gpus": 0}})


def start_ray(count: int, **given: Any) -> None:
    """Ray with `count` processors in this process, which Flower's backend finds running; or a cluster of before.

    Ray gives itself 30 s, which no setting of it changes and a crowded machine may exceed: what the first try has brought
    into memory, the next finds there.

    Args:
        given: further arguments of `ray.init`.

    Raises:
        BackendError: it did not start, TRIES times.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray will have it; else it warns
    joined = bool(os.environ.get("RAY_ADDRESS"))
    here = given | ({} if joined else {"num_cpus": count})
    path = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])  # as Flower's backend has it
    options = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False, **here}
    why = ""
    for _ in range(1 if joined else TRIES):
        try:
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, **options)
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            _end_started(error)
            why = str(error).split(". ")[0]
    raise BackendError(f"Ray did not start: {why}; try again on a quieter machine, or set RAY_ADDRESS")


def _end_started(error: Exception) -> None:
    """End the processes of a Ray that did not start: `ray.shutdown` does not know it, only the error's frames still do."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node: Any = frame.f_locals.get("self")
        if hasattr(node, "kill_all_processes"):
            node.kill_all_processes(check_alive=False, wait=True)
            return


def open_app(folder: str) -> Callable[[Message, Context], Message]:
    """In an actor: the ClientApp on shared material, opened once."""
    return _opened(folder)


@lru_cache(maxsize=1)
def _opened(folder: str) -> Callable[[Message, Context], Message]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app = open_shared(Path(folder)).app()

    def call(message: Message, context: Context) -> Message:
        flwr_compat.enter_run(context.run_id)
        return answer_of(app, message, context)

    return call
