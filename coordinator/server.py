"""The coordinator's gRPC server, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from pocketfed.coordinator.assignments import Assignments, devices_online
from pocketfed.coordinator.calls import Calls
from pocketfed.coordinator.distribution import DistributionServicer
from pocketfed.coordinator.fleet import FleetServicer
from pocketfed.coordinator.outages import Outages
from pocketfed.coordinator.store import Store
from pocketfed.protos import distribution_pb2_grpc, fleet_pb2_grpc

MAX_MESSAGE_BYTES = 4 << 20
STOP_S = 2.0  # what calls under way get to end


class ServeError(RuntimeError):
    """The server cannot start."""


def default_spool(store: Store) -> Path:
    """Beside the database where that is a file, else in the working folder."""
    return store.file.with_name(store.file.name + ".spool") if store.file else Path("pocketfed.spool").absolute()


@dataclass(frozen=True)
class ServerConfig:
    """listen: HOST:PORT, port 0 for any free one."""

    listen: str = "127.0.0.1:8765"
    lease_s: float = 30.0
    enrolment_key: str = ""


class CoordinatorServer:
    """Serves a store's artifacts and assignments to devices, from `start()` to `stop()`."""

    def __init__(self, store: Store, config: ServerConfig, spool: Path | None = None) -> None:
        self.store, self.config = store, config
        self.assignments = Assignments(store, spool or default_spool(store))
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pocketfed-server", daemon=True)
        self._calls: Calls | None = None
        self._server: grpc.aio.Server | None = None

    def start(self) -> int:
        """Returns the port.

        Raises:
            ServeError: not an address, or one that is taken.
        """
        host, colon, port = self.config.listen.rpartition(":")
        if not (colon and host and port.isdigit() and int(port) < 65536):
            self.stop()
            raise ServeError(f"{self.config.listen!r} is not HOST:PORT, e.g. 127.0.0.1:8765")
        self._thread.start()
        try:
            self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except RuntimeError:
            self.stop()
            raise ServeError(
                f"cannot listen on {self.config.listen}: the address is taken or not of this machine; "
                "choose another port"
            ) from None
        return self.port

    async def _start(self) -> int:
        self._calls = Calls(self.store, self.assignments, self.config.lease_s, self.config.enrolment_key)
        self._server = grpc.aio.server(
            interceptors=[Outages()],
            options=[
                ("grpc.so_reuseport", 0),  # two coordinators on one port would share the devices between them
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_metadata_size", 16 << 10),
            ],
        )
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetServicer(self._calls), self._server)
        distribution = DistributionServicer(self._calls)
        distribution_pb2_grpc.add_DistributionServicer_to_server(distribution, self._server)
        port = self._server.add_insecure_port(self.config.listen)
        if port == 0:
            raise RuntimeError("not bound")
        await self._server.start()
        return port

    async def _stop(self, server: grpc.aio.Server) -> None:
        ending = asyncio.ensure_future(server.stop(STOP_S))
        await asyncio.sleep(0)  # no new calls from here on
        if self._calls is not None:
            self._calls.stopping = True
        self.assignments.notify_offered()  # long polls end now, not when their grace is over
        await ending

    def online(self, channel: str) -> dict[int, str]:
        """Devices (id -> name) that could take part now."""
        with self.store.read() as session:
            return devices_online(session, channel)

    def stop(self) -> None:
        """End calls, then the loop; returns when both have ended."""
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._stop(self._server), self._loop).result()
            self._server = None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        if self._calls is not None:
            self._calls.threads.shutdown()
            self._calls = None

    def __enter__(self) -> CoordinatorServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
