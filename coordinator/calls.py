"""What all gRPC calls share: the store, a few threads for SQL, and telling devices apart."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import grpc

from pocketfed.coordinator.assignments import Assignments
from pocketfed.coordinator.enrolment import authenticate
from pocketfed.coordinator.store import Store

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Calls:
    """`run` keeps SQL and files off the event loop."""

    store: Store
    assignments: Assignments
    lease_s: float
    enrolment_key: str = ""
    stopping: bool = False  # long polls answer at once
    asking: Counter[int] = field(default_factory=Counter)  # device id -> long polls open now
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "pocketfed-sql"))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: function(*args, **kwargs))

    async def authenticate(self, context: Any) -> tuple[int, str]:
        """(device id, channel) of the caller; without a known token the call ends here."""
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        token = given.removeprefix("Bearer ") if isinstance(given, str) else ""
        found = await self.run(authenticate, self.store, token)
        if found is None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "this device is not known here; enrol it (again), with a new home folder",
            )
        return found  # type: ignore[return-value]
