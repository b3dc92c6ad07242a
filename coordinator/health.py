"""Whether the coordinator lives and whether it is ready, by gRPC's own health protocol (grpc.health.v1).

"" is the process: SERVING for as long as it answers. The services are ready where this coordinator leads and its database
takes what it writes; NOT_SERVING while it stands by, starts or ends, or while the database is out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVICES = ("pocketfed.v1.Fleet", "pocketfed.v1.Distribution")


class HealthError(RuntimeError):
    """Health cannot be served; one sentence."""


class Health:
    """What is told on the coordinator's port, and on one of its own, which answers while it stands by too.

    On the former `Check` alone: strangers could hold streams open there until there is no place for devices.
    """

    def __init__(self) -> None:
        self._servicer = health.HealthServicer()
        self._servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        self.leads = False  # this coordinator serves
        self.set_ready(False)

    def set_ready(self, ready: bool) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        self.ready = ready
        for name in SERVICES:
            self._servicer.set(name, serving if ready else not_serving)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.service not in ("", *SERVICES):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:80]!r}")
        return self._servicer.Check(request, context)

    @contextlib.contextmanager
    def served(self, address: str, port: int) -> Iterator[int]:
        """Answer on that port (0: any free one, which is given), Check and Watch, for as long as the block lasts.

        Raises:
            HealthError: the port is taken, or not of this machine.
        """
        threads = ThreadPoolExecutor(2, "pocketfed-health")
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=64)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        try:
            bound = server.add_insecure_port(f"{address}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise HealthError(f"cannot answer for the health on {address}:{port}; choose another --health-port")
        server.start()
        try:
            yield bound
        finally:
            server.stop(0.5).wait()
            threads.shutdown()
