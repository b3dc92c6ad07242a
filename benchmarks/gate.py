"""What the gate adds to a call: the same empty servicer behind it and without it, calls in turn, on one machine.

    python benchmarks/gate.py --devices 1000 --calls 2000
    python benchmarks/gate.py --database postgresql+psycopg://...

Client and servers share a process and its interpreter lock, so a call takes longer than between two machines' processes;
the difference of the two is what the gate does: telling the device by its token (one query), counting, reading, parsing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.calls import Calls
from pocketfed.coordinator.enrolment import enrol
from pocketfed.coordinator.gate import Gate
from pocketfed.coordinator.limits import Limits
from pocketfed.coordinator.store import Store
from pocketfed.protos import fleet_pb2, fleet_pb2_grpc

BLOCK = 50  # calls in a row, so that CPU time can be told apart
UNLIMITED = Limits(calls_per_s=1e9, calls_burst=1e9)  # a benchmark is hasty; the buckets are asked all the same


class Empty(fleet_pb2_grpc.FleetServicer):
    async def Heartbeat(self, request: fleet_pb2.HeartbeatRequest, context: Any) -> fleet_pb2.HeartbeatReply:  # noqa: N802
        return fleet_pb2.HeartbeatReply()


async def start(calls: Calls | None) -> tuple[grpc.aio.Server, int]:
    """A server with the empty servicer; behind the gate if there are calls to count."""
    server = grpc.aio.server()
    if calls is None:
        fleet_pb2_grpc.add_FleetServicer_to_server(Empty(), server)
    else:
        Gate(calls).add(server, fleet_pb2.DESCRIPTOR.services_by_name["Fleet"], Empty())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def measure(ways: dict[str, Callable[[], object]], count: int) -> dict[str, tuple[list[float], float]]:
    """Milliseconds of each call, and CPU milliseconds a call of the whole process; the ways in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    cpu = dict.fromkeys(ways, 0.0)
    for _ in range(max(1, count // BLOCK)):
        for name, call in ways.items():
            begun_cpu = time.process_time()
            for _ in range(BLOCK):
                begun = time.perf_counter()
                call()
                taken[name].append(1000 * (time.perf_counter() - begun))
            cpu[name] += 1000 * (time.process_time() - begun_cpu)
    return {name: (values, cpu[name] / len(values)) for name, values in taken.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """
    >>> percentile(range(101), 0.99)
    99
    """
    return sorted(values)[round(share * (len(values) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000, help="enrolled; the calls come from them in turn")
    parser.add_argument("--calls", type=int, default=2000, help="of each kind")
    parser.add_argument("--database", default="", help="an empty one; by default an SQLite file")
    arguments = parser.parse_args()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def on_loop(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    with tempfile.TemporaryDirectory() as scratch:
        store = Store(arguments.database or str(Path(scratch) / "fleet.db"))
        tokens = [f"{i:043d}" for i in range(arguments.devices)]
        for i, token in enumerate(tokens):
            enrol(store, f"phone-{i:05d}", "stable", "", token, "")
        calls = Calls(store, Assignments(store, Path(scratch) / "spool"), 30.0, limits=UNLIMITED)
        servers = {"without the gate": on_loop(start(None)), "with the gate": on_loop(start(calls))}
        channels = {name: grpc.insecure_channel(f"127.0.0.1:{port}") for name, (_, port) in servers.items()}
        asked = fleet_pb2.HeartbeatRequest(assignment_id="1-1-1-1-train", progress=0.5)
        sent = [0]

        def caller(channel: grpc.Channel) -> Callable[[], object]:
            stub = fleet_pb2_grpc.FleetStub(channel)

            def call() -> object:
                sent[0] += 1
                token = tokens[sent[0] % len(tokens)]
                return stub.Heartbeat(asked, timeout=60, metadata=(("authorization", f"Bearer {token}"),))

            return call

        ways = {name: caller(channel) for name, channel in channels.items()}
        measure(ways, 4 * BLOCK)  # connections, caches
        found = measure(ways, arguments.calls)
        for name, (values, cpu) in found.items():
            p50, p99 = statistics.median(values), percentile(values, 0.99)
            print(f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {cpu:.2f} ms of CPU a call (client and server)")
        (bare, bare_cpu), (gated, gated_cpu) = found.values()
        added = statistics.median(gated) - statistics.median(bare)
        print(
            f"the gate adds {added:.2f} ms at p50, {percentile(gated, 0.99) - percentile(bare, 0.99):.2f} ms at p99, "
            f"{gated_cpu - bare_cpu:.2f} ms of CPU"
        )
        for channel in channels.values():
            channel.close()
        for server, _ in servers.values():
            on_loop(server.stop(None))
        calls.threads.shutdown()
        store.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


if __name__ == "__main__":
    main()
