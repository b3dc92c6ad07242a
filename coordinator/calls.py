"""What all gRPC calls share: the store, a few threads for SQL, and telling devices apart."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.limits import Buckets, Limits
from pocketfed.coordinator.store import Store
from pocketfed.coordinator.vitals import Tally

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """The device that a call's credential belongs to."""

    device_id: int
    channel: str
    token_hash: str


caller: ContextVar[Caller] = ContextVar("caller")
waited_s: ContextVar[float] = ContextVar("waited_s", default=0.0)  # of a call: how long it had nothing to do


class Places:
    """Notices a credential that two processes use in turns: each process of the SDK names itself by a random number.

    A process that has been followed by another and then is heard again has a double; one that was merely started anew
    has not. Only the last few names of the last `most` devices are kept, in memory.

    >>> places = Places(most=10)
    >>> [places.shared(1, name) for name in ("a", "b", "b", "c", "b")]
    [False, False, False, False, True]
    """

    KEPT = 4

    def __init__(self, most: int) -> None:
        self._most = most
        self._heard: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def shared(self, device_id: int, instance: str) -> bool:
        heard = self._heard.get(device_id, ())
        if not instance or (heard and heard[-1] == instance):
            return False
        known = instance in heard
        self._heard[device_id] = (*(name for name in heard if name != instance), instance)[-self.KEPT :]
        self._heard.move_to_end(device_id)
        if len(self._heard) > self._most:
            self._heard.popitem(last=False)
        return known


@dataclass
class Calls:
    """`run` keeps SQL and files off the event loop."""

    store: Store
    assignments: Assignments
    lease_s: float
    enrolment_key: str = ""
    key_needed: bool = False  # to enrol, even where there is no key yet
    limits: Limits = field(default_factory=Limits)
    tally: Tally = field(default_factory=Tally)
    stopping: bool = False  # long polls answer at once
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "pocketfed-sql"))

    def __post_init__(self) -> None:
        most = self.limits.peers
        self.of_credential = Buckets(self.limits.calls_per_s, self.limits.calls_burst, most)
        self.doubtful = Buckets(self.limits.doubtful_per_s, self.limits.doubtful_burst, most)
        self.places = Places(most)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def authenticate(self, context: Any) -> tuple[int, str]:
        """(device id, channel) of the caller, whom the gate has recognised."""
        known = caller.get()
        return known.device_id, known.channel
