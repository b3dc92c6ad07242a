"""The coordinator's gRPC server, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import sqlalchemy as sa

from pocketfed.coordinator.assignments import Assignments, devices_online
from pocketfed.coordinator.calls import Calls
from pocketfed.coordinator.distribution import DistributionServicer
from pocketfed.coordinator.enrolment import capped
from pocketfed.coordinator.fleet import FleetServicer
from pocketfed.coordinator.gate import Gate
from pocketfed.coordinator.health import SERVICE as HEALTH
from pocketfed.coordinator.health import Health
from pocketfed.coordinator.limits import Limits, server_options
from pocketfed.coordinator.store import Lease, Store, latest_release
from pocketfed.coordinator.tls import Tls, TlsError, is_loopback, server_credentials
from pocketfed.coordinator.vitals import Tally
from pocketfed.protos import distribution_pb2, fleet_pb2

log = logging.getLogger("pocketfed.coordinator")
STOP_S = 2.0  # what calls under way get to end
PROBE_S = 5.0  # how often it is tried whether the database takes anything
HANGS_S = 10.0  # a probe that takes longer finds a database that hangs


class ServeError(RuntimeError):
    """The server cannot start."""


def default_spool(store: Store) -> Path:
    """Beside the database where that is a file, else in the working folder."""
    return store.file.with_name(store.file.name + ".spool") if store.file else Path("pocketfed.spool").absolute()


@dataclass(frozen=True)
class ServerConfig:
    """listen: HOST:PORT, port 0 for any free one; what other machines can reach needs `tls`, or that it is done without.

    enrolment_key: one that lets any number of devices in, beside those of the store. Where other machines can come, a key
    is always asked for.
    """

    listen: str = "127.0.0.1:8765"
    lease_s: float = 30.0
    enrolment_key: str = ""
    tls: Tls | None = None
    allow_plaintext_off_loopback: bool = False
    limits: Limits = field(default_factory=Limits)


def check_listen(config: ServerConfig) -> None:
    """
    Raises:
        ServeError: not an address, or one that other machines can reach, without TLS.
    """
    host, colon, port = config.listen.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 65536):
        raise ServeError(f"{config.listen!r} is not HOST:PORT, e.g. 127.0.0.1:8765")
    if config.tls is None and not is_loopback(host):
        if not config.allow_plaintext_off_loopback:
            raise ServeError(
                f"other machines can reach {host} and there is no certificate to encrypt with; make one with `pocketfed certs`, "
                "listen on 127.0.0.1, or say --allow-plaintext-off-loopback if the network is yours"
            )
        log.warning("%s is served in plaintext: tokens and updates can be read on the way", config.listen)


class CoordinatorServer:
    """Serves a store's artifacts and assignments to devices, from `start()` to `stop()`."""

    def __init__(
        self,
        store: Store,
        config: ServerConfig,
        spool: Path | None = None,
        health: Health | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.store, self.config = store, config
        self.health, self.tally = health or Health(), tally or Tally()
        self.assignments = Assignments(store, spool or default_spool(store))
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pocketfed-server", daemon=True)
        self._calls: Calls | None = None
        self._server: grpc.aio.Server | None = None
        self._fleet: FleetServicer | None = None
        self._probing: asyncio.Task[None] | None = None

    def start(self) -> int:
        """Returns the port.

        Raises:
            ServeError: not an address, one that is taken, or one that needs TLS. TlsError: certificates that do not fit.
        """
        try:
            check_listen(self.config)
        except ServeError:
            self.stop()
            raise
        self._thread.start()
        try:
            self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except TlsError:
            self.stop()
            raise
        except RuntimeError:
            self.stop()
            raise ServeError(
                f"cannot listen on {self.config.listen}: the address is taken or not of this machine; "
                "choose another port"
            ) from None
        return self.port

    async def _start(self) -> int:
        config, limits = self.config, self.config.limits
        key_needed = not is_loopback(config.listen.rpartition(":")[0])
        self._calls = Calls(
            self.store, self.assignments, config.lease_s, config.enrolment_key, key_needed, limits, self.tally
        )
        self.store.on_write = self.tally.wrote
        self._server = grpc.aio.server(options=server_options(limits), maximum_concurrent_rpcs=limits.calls_at_once)
        gate = Gate(self._calls)
        self._fleet = FleetServicer(self._calls)
        gate.add(self._server, fleet_pb2.DESCRIPTOR.services_by_name["Fleet"], self._fleet)
        distribution = DistributionServicer(self._calls)
        gate.add(self._server, distribution_pb2.DESCRIPTOR.services_by_name["Distribution"], distribution)
        gate.add(self._server, HEALTH, self.health, open_to_all=("Check",))
        if config.tls is not None:
            port = self._server.add_secure_port(config.listen, server_credentials(config.tls))
        else:
            port = self._server.add_insecure_port(config.listen)
        if port == 0:
            raise RuntimeError("not bound")
        await self._server.start()
        self.health.leads = True
        self._probing = self._loop.create_task(self._probe(self._calls))
        return port

    async def _probe(self, calls: Calls) -> None:
        """Ready for as long as the database takes what is written."""
        trying: asyncio.Future[None] | None = None  # one at a time, however long it takes
        while True:
            try:
                trying = trying or asyncio.ensure_future(calls.run(self._try_to_write))
                await asyncio.wait_for(asyncio.shield(trying), HANGS_S)  # a database that hangs answers nothing
                trying, ready = None, True
            except Exception as error:
                ready = False
                if trying is not None and trying.done():
                    trying = None
                if self.health.ready:
                    log.warning("not ready: the database takes nothing (%s)", error)
            self.health.set_ready(ready)
            await asyncio.sleep(PROBE_S)

    def _try_to_write(self) -> None:
        with (
            self.store.write() as session
        ):  # begins, asks whether this coordinator leads; the same again is a write too
            session.execute(sa.update(Lease).values(holder=Lease.holder))

    async def _stop(self, server: grpc.aio.Server) -> None:
        if self._probing is not None:
            self._probing.cancel()
        self.health.set_ready(False)
        self.health.leads = False
        ending = asyncio.ensure_future(server.stop(STOP_S))
        await asyncio.sleep(0)  # no new calls from here on
        if self._calls is not None:
            self._calls.stopping = True
        if self._fleet is not None:
            self._fleet.close()  # long polls end now, not when their grace is over
        await ending
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def online(self, channel: str, forms: bool = False) -> dict[int, str]:
        """Devices (id -> name) that could take part now. forms: as in `devices_online`."""
        with self.store.read() as session:
            newest = latest_release(session, channel)  # what it is not for is not trained by those devices either
            sdks = (newest.min_sdk, newest.max_sdk) if newest is not None else ("", "")
            return capped(session, devices_online(session, channel, forms, sdks))

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
