"""What several test modules share: a small dataset, and one artifact built from it per session."""

from __future__ import annotations

import os

# Before anything imports flwr, torch or onnxruntime.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pocketfed.model.tasks import Dataset, Example

if TYPE_CHECKING:
    from pocketfed.client_sdk.artifacts import Artifact
    from pocketfed.coordinator.artifacts import BuiltArtifact

TRAINABLE_SETS = ("full", "norms", "lora:4", "head")
# For each intent, how it is asked and about what. "the" and "please" say nothing, and "light" is in two intents.
_ASKED = {
    "alarm": (("wake me at", "set an alarm for", "get me up at"), ("six", "seven thirty", "noon", "first light")),
    "lights": (("turn on the", "switch off the", "dim the"), ("lamp", "kitchen light", "hall light", "bulbs")),
    "music": (("play", "put on", "i want to hear"), ("some jazz", "my songs", "the radio", "a waltz")),
    "weather": (("will it", "does it", "is it going to"), ("rain today", "snow at noon", "be cold", "be sunny")),
}


def make_examples(count: int, seed: int) -> tuple[Example, ...]:
    """The labels in turn, spoken by user-0 … user-5, a dozen sentences a label."""
    random_ = random.Random(seed)
    labels = sorted(_ASKED)
    examples = []
    for i in range(count):
        openings, subjects = _ASKED[labels[i % len(labels)]]
        text = f"{random_.choice(openings)} {random_.choice(subjects)}"
        text = f"please {text}" if random_.random() < 0.3 else text
        examples.append(Example(text, labels[i % len(labels)], user=f"user-{i % 6}"))
    return tuple(examples)


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """96 training and 24 test examples of 4 labels, equally many of each."""
    return Dataset(
        name="tiny",
        train=make_examples(96, seed=1),
        dev=(),
        test=make_examples(24, seed=2),
        labels=tuple(sorted(_ASKED)),
        skipped={},
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    """The same as files, as `simulate --data` takes them."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, examples in (("train", tiny_dataset.train), ("test", tiny_dataset.test)):
        lines = [json.dumps({"text": e.text, "label": e.label, "user": e.user}) for e in examples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def nano_built(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> BuiltArtifact:
    """An untrained `nano` with int8 backbone and four trainable sets, as the coordinator builds it."""
    import torch

    from pocketfed.coordinator.artifacts import build_artifact
    from pocketfed.model.config import STUDENTS
    from pocketfed.model.tokenization import train_vocabulary

    torch.set_num_threads(1)
    vocabulary = train_vocabulary((e.text for e in tiny_dataset.train), 256)
    return build_artifact(
        tmp_path_factory.mktemp("nano") / "artifact",
        config=STUDENTS["nano"].with_changes(vocab_size=len(vocabulary)),
        state={},
        vocabulary=vocabulary,
        labels=tiny_dataset.labels,
        trainable_sets=TRAINABLE_SETS,
        quantized=True,
        max_length=32,
        preset="nano",
        seed=7,
    )


@pytest.fixture(scope="session")
def nano_artifact(nano_built: BuiltArtifact) -> Artifact:
    """`nano_built`, opened as a device opens it. Shared: do not change its files."""
    from pocketfed.client_sdk.artifacts import open_artifact

    return open_artifact(nano_built.folder, nano_built.version)


# ---- databases ---------------------------------------------------------------------------------------------------------


_numbers = itertools.count()


def unprivileged() -> tuple[Callable[[], None] | None, int]:
    """How to become a user that PostgreSQL accepts: it refuses to run as root."""
    import pwd

    if os.geteuid() != 0:
        return None, os.geteuid()
    try:
        user = pwd.getpwnam("nobody")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user nobody")

    def become() -> None:
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)

    return become, user.pw_uid


class Cluster:
    """A PostgreSQL of its own, without network: its socket lies in `folder`."""

    def __init__(self, folder: str, become: Callable[[], None] | None, programs: tuple[str, str]) -> None:
        self.folder, self._become, (self._initdb, self._pg_ctl) = folder, become, programs
        self.url = f"postgresql+psycopg://pocketfed@/postgres?host={folder}"

    def _call(self, *command: str) -> None:
        done = subprocess.run(
            command,
            preexec_fn=self._become,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        if done.returncode:
            pytest.skip(f"{command[0]} does not work here: {done.stdout[-300:]!r}")

    def make(self) -> None:
        self._call(
            self._initdb, "-D", f"{self.folder}/data", "-U", "pocketfed", "--auth=trust", "--encoding=UTF8", "--no-sync"
        )

    def start(self) -> None:
        options = f"-c listen_addresses='' -k {self.folder} -F"
        log = f"{self.folder}/log"
        self._call(self._pg_ctl, "-D", f"{self.folder}/data", "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        self._call(self._pg_ctl, "-D", f"{self.folder}/data", "-w", "-m", "immediate", "stop")


@contextlib.contextmanager
def made_cluster() -> Iterator[Cluster]:
    """Started; stopped in the end."""
    pytest.importorskip("psycopg", reason="no PostgreSQL driver (psycopg) is installed")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # not on the PATH there
    where = os.pathsep.join([os.environ.get("PATH", ""), *map(str, debian)])
    initdb, pg_ctl = shutil.which("initdb", path=where), shutil.which("pg_ctl", path=where)
    if not (initdb and pg_ctl):
        pytest.skip("there is no PostgreSQL server here (initdb and pg_ctl)")
    import tempfile

    become, uid = unprivileged()
    with tempfile.TemporaryDirectory(prefix="pf-pg-") as folder:  # short: a socket's path has at most 107 characters
        os.chown(folder, uid, -1)
        made = Cluster(folder, become, (initdb, pg_ctl))
        made.make()
        made.start()
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a cluster that tests share."""
    with made_cluster() as made:
        yield made.url


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One that a test may stop and start."""
    with made_cluster() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of either kind: what the coordinator promises holds on both."""
    if request.param == "sqlite":
        yield str(tmp_path / "fleet.db")
        return
    import sqlalchemy as sa

    cluster = request.getfixturevalue("postgres")
    name = f"test_{next(_numbers)}"
    engine = sa.create_engine(cluster)
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {name}"))  # quicker than a database, and as good
    yield f"{cluster}&options=-csearch_path%3D{name}"
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP SCHEMA {name} CASCADE"))
    engine.dispose()
