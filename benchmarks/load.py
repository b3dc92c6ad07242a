"""How much one coordinator carries: check-ins, open long polls, rounds and downloads, all over loopback gRPC.

    python benchmarks/load.py                                   # everything, about four minutes
    python benchmarks/load.py --parts downloads --repeats 5
    python benchmarks/load.py --parts check-ins --devices 100,1000,10000,100000 --polls 1000 --seconds 15

`pocketfed serve` runs in a process of its own, as an operator starts it; devices are simulated by processes that speak the
wire protocol and nothing else (raw messages, so that the load costs little beside what is measured).

* check-ins: `--at-once` devices ask for work again and again (wait_s = 0), each answered before it asks anew, while
  `--polls` other devices hold long polls open, each on a connection of its own. Latency is what the asking process sees.
* sampling: in this process: who is there (of so many enrolled, `--polls` or all of them) and a cohort of 100 of them.
* rounds: all of `--polls` devices take part in rounds of a tiny update (16 numbers): offer, check-in, upload, aggregation.
* downloads: a blob in 1 MiB chunks, read by the SDK's own Link, beside the same bytes over a raw TCP socket: the same number
  of processes on each side, 1 MiB writes from memory, read into one buffer; both with and without SHA-256 of what arrives.

RSS and CPU are the serving process's own (/proc). CPU time per check-in is what to compare on a machine with other work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import sqlalchemy as sa

from pocketfed.client_sdk.link import Link
from pocketfed.coordinator.assignments import devices_online
from pocketfed.coordinator.enrolment import capped
from pocketfed.coordinator.sampling import sample_cohort
from pocketfed.coordinator.store import Device, Release, Store, now, put_artifact, put_blob
from pocketfed.model.parameters import encode_vector
from pocketfed.protos import fleet_pb2

SIZE = 16  # numbers in an update
READ_BYTES = 1 << 20
CHECK_IN, UPLOAD = "/pocketfed.v1.Fleet/CheckIn", "/pocketfed.v1.Fleet/Upload"
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
TICKS = os.sysconf("SC_CLK_TCK")


# ---- the fleet in the database -------------------------------------------------------------------------------------


def token_of(number: int) -> str:
    return f"device-{number:036d}"


def prepare(store: Store, devices: int, blob: bytes = b"") -> str:
    """An artifact of nothing but its starting parameters, released, and so many enrolled devices. Returns the blob's digest."""
    initial = encode_vector("theta", np.zeros(SIZE, np.float32))
    files = {"theta": {"sha256": hashlib.sha256(initial).hexdigest()}}
    manifest = {"trainable_sets": {"all": {"initial": "theta", "size": SIZE}}, "files": files}
    moment = now()
    rows = [
        {
            "name": f"device-{n:06d}",
            "channel": "stable",
            "token_hash": hashlib.sha256(token_of(n).encode()).hexdigest(),
            "sdk_version": "load",
            "examples": 0,
            "enrolled_at": moment,
        }
        for n in range(devices)
    ]
    with store.write() as session:
        put_artifact(session, manifest, "v1", [initial])
        digest = put_blob(session, initial)
        session.add(Release(channel="stable", artifact_version="v1", trainable_set="all", parameters=digest))
        session.execute(sa.insert(Device), rows)
        return put_blob(session, blob) if blob else ""


# ---- the coordinator, from outside ---------------------------------------------------------------------------------


@dataclass
class Process:
    """`pocketfed serve`, or any child that says where it listens."""

    child: subprocess.Popen[str]
    address: str = ""

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.child.pid}/fd"))


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[Process]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "ERROR"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)
    try:
        yield Process(child)
    finally:
        child.terminate()
        child.wait(60)
        assert child.stdout is not None
        child.stdout.close()


@contextlib.contextmanager
def serving(database: str, *more: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "pocketfed.cli", "serve", "--database", database, "--listen", "127.0.0.1:0"]
    with started([*command, *more]) as process:
        process.address = said(process, "listening on").split()[2].rstrip(",")
        yield process


def said(process: Process, begin: str) -> str:
    assert process.child.stdout is not None
    for line in process.child.stdout:
        if line.startswith(begin):
            return line
    raise RuntimeError(f"{process.child.args} ended without saying {begin!r}; run it alone to see why")


@contextlib.contextmanager
def acting(role: str, *words: object) -> Iterator[Process]:
    """One of the simulated parts below, in a process of its own; it has said that it is ready."""
    with started([sys.executable, __file__, "--role", role, *map(str, words)], stdin=subprocess.PIPE) as process:
        process.address = said(process, "ready").partition(" ")[2].strip()
        yield process


def go(*processes: Process) -> None:
    for process in processes:
        assert process.child.stdin is not None
        process.child.stdin.write("go\n")
        process.child.stdin.flush()


def report_of(process: Process) -> dict[str, Any]:
    assert process.child.stdout is not None
    row: dict[str, Any] = json.loads(process.child.stdout.readline())
    return row


# ---- simulated devices: each function is one process's work ----------------------------------------------------------


def ready(text: str = "") -> None:
    """Say so, and wait for the word."""
    print(f"ready {text}".strip(), flush=True)
    sys.stdin.readline()


def metadata(number: int) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token_of(number)}"), ("pocketfed-instance", f"{number}"))


def check_in_request(wait_s: float, examples: int) -> bytes:
    asked = fleet_pb2.CheckInRequest(protocol=1, sdk_version="load", examples=examples, wait_s=wait_s, release_id=1)
    return bytes(asked.SerializeToString())


async def poll(address: str, first: int, count: int, seconds: float, examples: int) -> None:
    """Hold long polls open, a connection each; take what is offered and hand in a tiny update, until the time is up."""
    ask = check_in_request(60.0, examples)
    uploads, failures = 0, dict[str, int]()

    async def device(number: int, channel: grpc.aio.Channel) -> None:
        nonlocal uploads
        check_in = channel.unary_unary(CHECK_IN)
        upload = channel.stream_unary(UPLOAD)
        own = np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)
        while True:
            try:
                reply = fleet_pb2.CheckInReply.FromString(await check_in(ask, metadata=metadata(number), timeout=90))
                if reply.HasField("assignment"):
                    data = encode_vector("delta", own + reply.assignment.round)
                    header = fleet_pb2.UploadHeader(
                        assignment_id=reply.assignment.id,
                        total_bytes=len(data),
                        digest=hashlib.sha256(data).hexdigest(),
                        num_examples=5,
                    )
                    parts = (fleet_pb2.UploadPart(header=header), fleet_pb2.UploadPart(data=data))
                    sent = iter([part.SerializeToString() for part in parts])
                    await upload(sent, metadata=metadata(number), timeout=90)
                    uploads += 1
            except grpc.aio.AioRpcError as error:
                key = f"{error.code().name}: {(error.details() or '')[:80]}"
                failures[key] = failures.get(key, 0) + 1
                await asyncio.sleep(1.0)

    channels = [grpc.aio.insecure_channel(address, OWN_CONNECTION) for _ in range(count)]
    for some in range(0, count, 100):
        await asyncio.gather(*(c.channel_ready() for c in channels[some : some + 100]))
    devices = [asyncio.ensure_future(device(first + n, channel)) for n, channel in enumerate(channels)]
    await asyncio.sleep(2.0 + count / 1000)  # all have asked
    print("ready", flush=True)
    stop = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop, seconds)
    for each in devices:
        each.cancel()
    await asyncio.gather(*devices, return_exceptions=True)
    print(json.dumps({"uploads": uploads, "failures": failures}), flush=True)
    os._exit(0)  # a thousand connections need not be closed one by one


async def ask(address: str, devices: int, skip: int, at_once: int, seconds: float) -> None:
    """Check in with one device after the other, `at_once` at a time, and tell how long each call took."""
    request, took = check_in_request(0.0, 0), list[float]()
    channels = [grpc.aio.insecure_channel(address, OWN_CONNECTION) for _ in range(min(at_once, 64))]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    numbers = iter(int(n) for n in np.random.default_rng(0).integers(skip, devices, 10_000_000))
    ready()
    end = time.perf_counter() + seconds

    async def devices_in_turn(channel: grpc.aio.Channel) -> None:
        check_in = channel.unary_unary(CHECK_IN)
        while (begin := time.perf_counter()) < end:
            await check_in(request, metadata=metadata(next(numbers)), timeout=60)
            took.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*(devices_in_turn(channels[n % len(channels)]) for n in range(at_once)))
    print(json.dumps({"count": len(took), "seconds": time.perf_counter() - begin, "ms": quantiles(took)}), flush=True)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """
    >>> quantiles([n / 1000 for n in range(1, 101)])
    {'p50': 50.5, 'p95': 95.05, 'p99': 99.01}
    """
    values = np.percentile(np.array(seconds) * 1000, (50, 95, 99))
    return {f"p{q}": round(float(v), 2) for q, v in zip((50, 95, 99), values, strict=True)}


def fetch(address: str, digest: str, number: int, times: int, hashed: bool) -> None:
    """Download a blob with the SDK's Link, so many times."""
    link = Link(address, token_of(number))
    next(link.download(digest), None)  # the connection is there, and the coordinator has seen the blob
    ready()
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    for _ in range(times):
        for chunk in link.download(digest):
            if hashed:
                hashlib.sha256(chunk).digest()
            count += len(chunk)
    told(begin, cpu, count)
    link.close()


def read_raw(address: str, count: int, hashed: bool) -> None:
    """Read so many bytes off a socket."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        buffer = memoryview(bytearray(READ_BYTES))
        ready()
        begin, cpu, left = time.perf_counter(), time.process_time(), count
        connection.sendall(count.to_bytes(8, "big"))
        while left:
            held = 0
            while held < min(len(buffer), left):
                got = connection.recv_into(buffer[held : min(len(buffer), left)])
                if not got:
                    raise RuntimeError(f"the connection ended {left - held} bytes early")
                held += got
            if hashed:
                hashlib.sha256(buffer[:held]).digest()
            left -= held
        told(begin, cpu, count)


def told(begin: float, cpu: float, count: int) -> None:
    now_s = time.perf_counter()
    print(
        json.dumps({"begin": begin, "end": now_s, "cpu_s": time.process_time() - cpu, "bytes": count}),
        flush=True,
    )


def send_raw(size: int) -> None:
    """Whoever connects and says how many bytes gets them, 1 MiB at a time, from memory; a thread a connection."""
    data = memoryview(os.urandom(size))

    def serve(connection: socket.socket) -> None:
        with connection:
            left = int.from_bytes(connection.recv(8), "big")
            while left:
                for start in range(0, len(data), READ_BYTES):
                    piece = data[start : start + min(READ_BYTES, left)]
                    connection.sendall(piece)
                    left -= len(piece)
                    if not left:
                        return

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        print(f"ready 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


# ---- what is measured ----------------------------------------------------------------------------------------------


def measure_check_ins(given: argparse.Namespace, devices: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        store = Store(given.database or f"{scratch}/load.db")
        polls = min(given.polls, devices // 2)
        prepare(store, devices)
        store.close()
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(serving(given.database or f"{scratch}/load.db", *given.serve))
            idle_rss = server.rss_mb()
            polling = [
                stack.enter_context(acting("poll", server.address, first, count, 600, 0))
                for first, count in shares(polls, 2)
            ]
            held, files = server.rss_mb(), server.open_files()
            rests, begin = server.cpu_s(), time.perf_counter()
            time.sleep(3.0)
            resting = (server.cpu_s() - rests) / (time.perf_counter() - begin)
            asking = stack.enter_context(acting("ask", server.address, devices, polls, given.at_once, given.seconds))
            before = server.cpu_s()
            go(asking)
            row = report_of(asking)
            used = server.cpu_s() - before
            go(*polling)
            failures: dict[str, int] = {}
            for each in polling:
                failures |= report_of(each)["failures"]
            return {
                "devices": devices,
                "polls": polls,
                "per_s": round(row["count"] / row["seconds"], 1),
                **row["ms"],
                "cpu_ms_each": round(1000 * used / row["count"], 3),
                "cpu": round(used / row["seconds"], 2),
                "cpu_with_polls_only": round(resting, 3),
                "rss_mb": round(server.rss_mb(), 1),
                "rss_mb_before_polls": round(idle_rss, 1),
                "rss_mb_with_polls": round(held, 1),
                "open_files": files,
                **({"failures": failures} if failures else {}),
            }


def shares(count: int, parts: int) -> list[tuple[int, int]]:
    """(first, how many) of each part.

    >>> shares(5, 2), shares(1, 2)
    ([(0, 2), (2, 3)], [(0, 1)])
    """
    edges = [count * n // parts for n in range(parts + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges) if b > a] or [(0, 0)]


def measure_rounds(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        database = given.database or f"{scratch}/load.db"
        store = Store(database)
        prepare(store, given.polls)
        store.close()
        run = Path(scratch) / "run.toml"
        run.write_text(
            f'name = "load"\nrounds = {given.rounds}\nmin_devices = {given.polls}\nretain_rounds = 2\nlease_s = 60.0\n'
            "release = false\n"
        )
        more = ("--run", str(run), "--json", f"{scratch}/run.json", "--exit-when-done", *given.serve)
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(serving(database, *more))
            polling = [
                stack.enter_context(acting("poll", server.address, first, count, 600, 5))
                for first, count in shares(given.polls, 2)
            ]
            lines, before, begin = [], server.cpu_s(), 0.0
            assert server.child.stdout is not None
            for line in server.child.stdout:
                if line.strip()[:1].isdigit():
                    lines.append(time.perf_counter())
                    if len(lines) == 2:  # round 0 measures nothing, round 1 warms up
                        before, begin = server.cpu_s(), lines[-1]
                    used, rss = server.cpu_s() - before, server.rss_mb()
                if line.startswith("run ") and "finished" in line:
                    break
            go(*polling)
            uploads = sum(report_of(each)["uploads"] for each in polling)
            rounds = len(lines) - 2
            return {
                "devices": given.polls,
                "rounds": rounds,
                "s_a_round": round((lines[-1] - begin) / rounds, 3),
                "cpu_ms_an_update": round(1000 * used / (rounds * given.polls), 3),
                "uploads": uploads,
                "rss_mb": round(rss, 1),
            }


def measure_sampling(given: argparse.Namespace, devices: int) -> dict[str, Any]:
    """Median CPU time of 9."""
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        store = Store(given.database or f"{scratch}/load.db")
        prepare(store, devices)
        row: dict[str, Any] = {"devices": devices}
        for there in sorted({min(given.polls, devices), devices}):
            until = now() + timedelta(hours=1)
            with store.write() as session:
                session.execute(sa.update(Device).where(Device.id <= there).values(examples=5, present_until=until))
            who, whom = [], []
            for seed in range(9):
                begin = time.process_time()
                with store.read() as session:
                    online = capped(session, devices_online(session, "stable"))
                between = time.process_time()
                sample_cohort(online, 100, seed, 1, 1)
                who.append(between - begin)
                whom.append(time.process_time() - between)
            assert len(online) == there
            row[f"online_ms_{there}"] = round(1000 * statistics.median(who), 2)
            row[f"sample_ms_{there}"] = round(1000 * statistics.median(whom), 2)
        store.close()
        return row


def throughput(processes: list[Process]) -> dict[str, float]:
    """Of processes that began together: all bytes over the time from the first to begin to the last to end."""
    go(*processes)
    rows = [report_of(each) for each in processes]
    seconds = max(row["end"] for row in rows) - min(row["begin"] for row in rows)
    total = sum(row["bytes"] for row in rows)
    return {"mb_per_s": total / seconds / 1e6, "client_cpu_s_per_gb": sum(row["cpu_s"] for row in rows) / total * 1e9}


def measure_downloads(given: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        database = given.database or f"{scratch}/load.db"
        store = Store(database)
        size = given.blob_mib << 20
        digest = prepare(store, 64, os.urandom(size))
        store.close()
        with serving(database, *given.serve) as server, acting("send-raw", size) as raw:
            for clients in given.clients:
                times = max(1, given.total_mib // given.blob_mib // clients)
                for hashed in (0, 1):
                    rows = []
                    for _ in range(given.repeats):
                        with contextlib.ExitStack() as stack:
                            each = [
                                stack.enter_context(acting("read-raw", raw.address, times * size, hashed))
                                for _ in range(clients)
                            ]
                            tcp = throughput(each)
                        with contextlib.ExitStack() as stack:
                            each = [
                                stack.enter_context(acting("fetch", server.address, digest, n, times, hashed))
                                for n in range(clients)
                            ]
                            before = server.cpu_s()
                            ours = throughput(each)
                            used = (server.cpu_s() - before) / (times * size * clients) * 1e9
                        rows.append({**ours, "server_cpu_s_per_gb": used, "tcp": tcp["mb_per_s"]})
                        rows[-1]["ratio"] = rows[-1]["mb_per_s"] / rows[-1]["tcp"]
                    found.append(
                        {
                            "clients": clients,
                            "sha256": bool(hashed),
                            **{k: middle([r[k] for r in rows]) for k in rows[0]},
                        }
                    )
                    print(json.dumps(found[-1]), flush=True)
            found.append({"rss_mb": round(server.rss_mb(), 1)})
    return found


def middle(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [float(f"{v:.3g}") for v in (statistics.median(values), min(values), max(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check-ins,sampling,rounds,downloads")
    parser.add_argument("--devices", default="100,1000,10000", help="enrolled devices")
    parser.add_argument("--polls", type=int, default=1000, help="long polls open; at most half of the devices")
    parser.add_argument("--at-once", type=int, default=32, help="check-ins under way at a time")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blob-mib", type=int, default=26, help="about the released backbone as int8")
    parser.add_argument("--total-mib", type=int, default=1664, help="to be downloaded in one measurement")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--database", help="an empty one, if not SQLite in a temporary folder")
    parser.add_argument("--serve", type=str.split, default=[], help="more options for `pocketfed serve`")
    parser.add_argument("--role", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if given.role:
        act(*given.role)
        return
    parts: dict[str, Callable[[], Any]] = {
        "check-ins": lambda: [shown(measure_check_ins(given, int(n))) for n in given.devices.split(",")],
        "sampling": lambda: [shown(measure_sampling(given, int(n))) for n in given.devices.split(",")],
        "rounds": lambda: shown(measure_rounds(given)),
        "downloads": lambda: measure_downloads(given),
    }
    print(json.dumps({name: parts[name]() for name in given.parts.split(",")}))


def shown(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row


def act(role: str, *words: str) -> None:
    if role == "poll":
        asyncio.run(poll(words[0], int(words[1]), int(words[2]), float(words[3]), int(words[4])))
    elif role == "ask":
        asyncio.run(ask(words[0], *map(int, words[1:4]), float(words[4])))
    elif role == "fetch":
        fetch(words[0], words[1], int(words[2]), int(words[3]), words[4] == "1")
    elif role == "read-raw":
        read_raw(words[0], int(words[1]), words[2] == "1")
    elif role == "send-raw":
        send_raw(int(words[0]))


if __name__ == "__main__":
    main()
