"""How much one peer may ask for: token buckets that forget, and numbers that bound what a call can cost."""

from __future__ import annotations

import ipaddress
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MESSAGE_BYTES = (1 << 20) + (64 << 10)  # a part of an update has at most 1 MiB
ENROL_BYTES = 4096
SPARE_FILES = 256  # file descriptors for the database, the spool and the process itself


@dataclass(frozen=True)
class Limits:
    """What one peer may cost. Rates are of token buckets: so many a second on average, `_burst` of them at once.

    calls: of one credential. doubtful: enrolments, and calls with an unknown token, of one address (IPv6: of its /64).
    calls_open, transfers_open: of one credential at a time; transfers_at_once: Uploads and Downloads of all devices.
    """

    calls_per_s: float = 20.0
    calls_burst: float = 200.0
    doubtful_per_s: float = 50.0
    doubtful_burst: float = 500.0
    calls_open: int = 16
    transfers_open: int = 6
    transfers_at_once: int = 256
    calls_at_once: int = 8192
    connections: int = 16384
    request_s: float = 10.0  # for a request to arrive
    part_s: float = 60.0  # for the next part of an upload to arrive
    transfer_s: float = 900.0  # for an upload or a download as a whole
    handshake_s: float = 10.0
    idle_s: float = 300.0  # a connection without a call
    peers: int = 65536  # credentials and addresses remembered at once


class Buckets:
    """A token bucket a peer, for the `most` peers heard last; one that is forgotten starts full again.

    >>> buckets = Buckets(rate=1.0, burst=2.0, most=10, clock=lambda: 0.0)
    >>> [buckets.take("phone") for _ in range(3)]
    [0.0, 0.0, 1.0]
    """

    def __init__(self, rate: float, burst: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._most, self._clock = rate, burst, most, clock
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # peer -> (tokens, when)

    def wait_s(self, peer: str) -> float:
        """0 if the peer may go on; else after how many seconds it may."""
        left = self._left(peer)
        return 0.0 if left >= 1.0 else (1.0 - left) / self._rate

    def take(self, peer: str) -> float:
        """As `wait_s`, and a token is gone if it may."""
        wait = self.wait_s(peer)
        if not wait:
            self._held[peer] = (self._left(peer) - 1.0, self._clock())
            self._held.move_to_end(peer)
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return wait

    def _left(self, peer: str) -> float:
        tokens, then = self._held.get(peer, (self._burst, self._clock()))
        return min(self._burst, tokens + (self._clock() - then) * self._rate)

    def __len__(self) -> int:
        return len(self._held)


@lru_cache(maxsize=4096)
def address_of(peer: str) -> str:
    """Whom a connection's address counts for.

    >>> address_of("ipv4:192.0.2.7:50123"), address_of("ipv6:%5B2001:db8::1:2:3:4%5D:443"), address_of("unix:")
    ('192.0.2.7', '2001:db8::/64', 'unix:')
    """
    _, _, place = peer.partition(":")
    host = place.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return peer[:100]
    return str(address) if address.version == 4 else str(ipaddress.ip_network(f"{address}/64", strict=False))


def server_options(limits: Limits) -> list[tuple[str, Any]]:
    """For gRPC: what it refuses before a line of ours runs."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(limits.connections, max(64, files - SPARE_FILES)) if files > 0 else limits.connections
    return [
        ("grpc.so_reuseport", 0),  # two coordinators on one port would share the devices between them
        ("grpc.max_receive_message_length", MESSAGE_BYTES),  # also of what a compressed message becomes
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.absolute_max_metadata_size", 16 << 10),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", round(limits.handshake_s * 1000)),
        ("grpc.max_connection_idle_ms", round(limits.idle_s * 1000)),
        ("grpc.keepalive_time_ms", 60_000),  # a peer that has gone without a word is noticed
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ("grpc.http2.max_ping_strikes", 2),
    ]
