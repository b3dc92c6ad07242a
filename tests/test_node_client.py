"""examples/node_client: a device in another language, written from docs/protocol.md, beside Python devices in one fleet."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from pocketfed.client_sdk import Device
from pocketfed.client_sdk.artifacts import Artifact, open_artifact
from pocketfed.client_sdk.order import epoch_order, split
from pocketfed.client_sdk.outgoing import NOTHING, Kept, UpdateForm, make_outgoing, norm
from pocketfed.client_sdk.perform import Kind, Reply, Task, perform
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, TrainConfig, train
from pocketfed.coordinator import signing
from pocketfed.coordinator import store as tables
from pocketfed.coordinator.artifacts import BuiltArtifact, build_artifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.config import UpdateForm as RunForm
from pocketfed.coordinator.grid import FleetGrid
from pocketfed.coordinator.operators import audit_lines
from pocketfed.coordinator.rounds import Interrupted, create_run, drive_run
from pocketfed.coordinator.server import CoordinatorServer, ServerConfig
from pocketfed.coordinator.store import Assignment, Chunk, Round, Run, Store, Update, get_blob
from pocketfed.coordinator.store import Device as DeviceRow
from pocketfed.coordinator.tls import make_certificates
from pocketfed.model.codecs import decode
from pocketfed.model.config import STUDENTS
from pocketfed.model.parameters import decode_vector, encode_vector
from pocketfed.model.tasks import Dataset, Example
from pocketfed.model.tokenization import train_vocabulary
from pocketfed.simulations.run import encode_examples

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "node_client"
PACKAGE: dict[str, Any] = json.loads((EXAMPLE / "package.json").read_text())
NUMBERS: dict[str, Any] = json.loads(
    (ROOT / "docs" / "protocol.md").read_text().rsplit("```json\n", 1)[1].split("```")[0]
)
CLOSE = 1e-4  # two builds of ONNX Runtime, and sums in another order
PATIENCE_S = 60.0
NAME = "node-device"
LONG = " ".join(["please turn on the kitchen light"] * 8)  # more than the 32 tokens of the artifact
LOCAL = LocalTraining(batch_size=4, learning_rate=0.002, max_length=32)

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not on the PATH; install Node.js 20")


@pytest.fixture(scope="session")
def packages() -> None:
    """The client's node_modules, as `npm install` makes them."""
    wanted = PACKAGE["dependencies"]
    stated = [EXAMPLE / "node_modules" / name / "package.json" for name in wanted]
    if all(
        p.is_file() and json.loads(p.read_text())["version"] == wanted[n] for n, p in zip(wanted, stated, strict=True)
    ):
        return
    if shutil.which("npm") is None:
        pytest.skip("npm is not on the PATH, and examples/node_client has no node_modules")
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0"]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False, timeout=300)
    if not all(p.is_file() for p in stated):
        pytest.skip(f"npm cannot install what examples/node_client needs: {done.stderr.strip()[-200:]}")


def script(code: str, *arguments: str | Path) -> Any:
    """What a module beside client.js prints as JSON; `arguments` are its process.argv from 1 on."""
    command = ["node", "--input-type=module", "-e", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- the page's numbers ----------------------------------------------------------------------------------------------

COMPUTE = """
import { derive, epochOrder, permutation, split } from './order.js';
import { condition, makeOptimizer, rateAt } from './training.js';
import { Trust } from './trust.js';
import { decodeVector, encodeVector, sha256 } from './vector.js';
const [, stated, home] = process.argv;
const { order, steps, vector, signed } = JSON.parse(stated);
const seed = derive(order.seed, order.round, order.name);
const rates = (schedule) =>
  Array.from({ length: 10 }, (_, t) => rateAt(t, 10, { learning_rate: 0.1, warmup: 0.25, schedule }));
const walk = (config) => {
  const start = Float32Array.from(steps.theta_0);
  const [theta, optimize] = [start.slice(), makeOptimizer(config, start.length)];
  return steps.gradients.map((values, i) => {
    const gradient = Float32Array.from(values);
    condition(gradient, theta, start, 1, { proximal_mu: 0.5, max_grad_norm: 0.25 });
    optimize(theta, gradient, steps.rates[i]);
    return [...theta];
  });
};
const bytes = encodeVector('delta', Float32Array.from(vector.delta));
const trust = new Trust(home + '/trust.json', JSON.parse(signed.statement).publisher, false);
const said = { statement: Buffer.from(signed.statement), signature: Buffer.from(signed.signature, 'hex') };
const refused = [];
for (const wrong of [
  { ...said, signature: Buffer.alloc(64) },
  { ...said, statement: Buffer.from(signed.statement.replace('"sequence": 1', '"sequence": 2')) },
  { ...said, statement: Buffer.from(signed.statement.replace('34750f98', '00000000')) },
  { ...said, statement: Buffer.from('not JSON') },
])
  try { trust.learnKeys(wrong); } catch (error) { refused.push(error.constructor.name); }
trust.learnKeys(said);
console.log(JSON.stringify({
  order: {
    derived: String(seed),
    permutation_of_5_from_0: permutation(5, 0n),
    epochs: order.epochs.map((_, epoch) => epochOrder(order.tokens, order.batch_size, seed, epoch)),
    held_out: split(order.tokens.length, order.holdout, seed)[0],
  },
  rates: { constant: rates('constant'), linear: rates('linear'), cosine: rates('cosine') },
  sgd: walk({ optimizer: 'sgd', momentum: 0.9 }),
  adamw: walk({ optimizer: 'adamw', weight_decay: 0.1 }),
  bytes: bytes.toString('hex'),
  sha256: sha256(bytes),
  decoded: [...decodeVector('delta', bytes, 2)],
  refused,
  sequence: trust.listSequence,
}));
"""


@pytest.mark.usefixtures("packages")
def test_it_computes_the_numbers_of_the_page(tmp_path: Path) -> None:
    found = script(COMPUTE, json.dumps(NUMBERS), tmp_path)
    assert found["order"].items() <= NUMBERS["order"].items()
    for schedule, rates in NUMBERS["rates"].items():
        assert found["rates"][schedule] == pytest.approx(rates, rel=1e-8)
    for name in ("sgd", "adamw"):
        assert np.array(found[name]) == pytest.approx(np.array(NUMBERS["steps"][name]), rel=2e-7)
    vector = NUMBERS["vector"]
    assert (found["bytes"], found["sha256"], found["decoded"]) == (vector["bytes"], vector["sha256"], vector["delta"])
    assert found["refused"] == ["Untrusted"] * 4
    assert found["sequence"] == 1


ORDERS = """
import { epochOrder, split } from './order.js';
const [lengths, batchSize, seed, epochs, share] = JSON.parse(process.argv[1]);
const orders = Array.from({ length: epochs }, (_, epoch) => epochOrder(lengths, batchSize, BigInt(seed), epoch));
console.log(JSON.stringify([orders, split(lengths.length, share, BigInt(seed))]));
"""


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (333, 4), (2000, 16)])
def test_it_orders_many_examples_as_python_does(count: int, batch_size: int) -> None:
    lengths = np.random.default_rng(count).integers(3, 40, count).tolist()
    seed = 2**64 - 1 - count
    orders, (held, rest) = script(ORDERS, json.dumps([lengths, batch_size, str(seed), 3, 0.3]))
    assert orders == [[b.tolist() for b in epoch_order(lengths, batch_size, seed, epoch)] for epoch in range(3)]
    assert [held, rest] == [places.tolist() for places in split(count, 0.3, seed)]


REFUSE = """
import { checkForm } from './form.js';
import { checkConfig } from './training.js';
import { decodeVector, encodeTensors, encodeVector } from './vector.js';
const config = { epochs: 1, batch_size: 1, max_length: 32, max_steps: 0, patience: 0, learning_rate: 0.1, momentum: 0,
  weight_decay: 0, max_grad_norm: 1, proximal_mu: 0, warmup: 0, label_smoothing: 0, holdout: 0, optimizer: 'sgd',
  schedule: 'constant' };
const bytes = encodeVector('theta', Float32Array.of(1, 2));
const said = [];
const refuse = (work) => { try { work(); said.push(null); } catch (error) { said.push(error.message); } };
refuse(() => checkConfig(config));
refuse(() => checkForm(null));
refuse(() => checkConfig({ ...config, optimizer: 'lion' }));
refuse(() => checkConfig({ ...config, epochs: 0 }));
refuse(() => checkConfig({ ...config, patience: 2 }));
const form = { codec: 'int8', clip_norm: 1, noise: 0, private: [], metrics: [] };
for (const codec of ['', 'float32', 'float16', 'int8', 'topk:0.5', 'topk:1e-3', 'ternary:0.1']) checkForm({ ...form, codec });
for (const other of [{ codec: 'topk' }, { codec: 'topk:0.6' }, { codec: 'topk:0' }, { codec: 'int8:1' }, { codec: 'ternary:' },
  { noise: 1 }, { private: ['head'] }, { clip_norm: NaN }, { frozen: ['lora_A'] }, { lora_rank: 4 }])
  refuse(() => checkForm({ ...form, ...other }));
for (const [name, data, size] of [['theta', bytes, 3], ['delta', bytes, 2], ['theta', bytes.subarray(0, 7), 2],
  ['theta', bytes.subarray(0, -1), 2], ['theta', Buffer.alloc(80, 255), 2],
  ['theta', encodeTensors({ control: Float32Array.of(0, 0), theta: Float32Array.of(1, 2) }), 2]])
  refuse(() => decodeVector(name, data, size));
console.log(JSON.stringify(said));
"""


@pytest.mark.usefixtures("packages")
def test_what_it_does_not_know_or_cannot_be_is_refused_in_a_sentence() -> None:
    good, none, optimizer, epochs, patience, *rest = script(REFUSE)
    codecs, unknown, vectors = rest[:5], rest[5:10], rest[10:]
    assert (good, none) == (None, None)
    assert optimizer == 'optimizer is "lion"; this client knows sgd, adamw'
    assert epochs == "epochs is 0; this client takes 1 to 1000"
    assert patience == "patience is 2, but nothing is held out"
    assert [said.split(" is not known here, only float32")[0] for said in codecs] == [
        "the codec topk", "the codec topk:0.6", "the codec topk:0", "the codec int8:1", "the codec ternary:"
    ]  # fmt: skip
    assert unknown[:2] == ["local noise and private parameters are not known here"] * 2
    assert unknown[2] == "clip_norm is NaN; this client takes 0 and more"
    assert unknown[3:] == ["frozen parameters and LoRA ranks are not known here"] * 2
    assert len(vectors) == 6  # the last: theta with a control variate
    assert all(said.endswith("not used") for said in vectors)


FORMED = """
import { readFileSync, writeFileSync } from 'node:fs';
import { formed } from './form.js';
const [, stated, folder] = process.argv;
const floats = (name) => { const b = readFileSync(folder + '/' + name); return new Float32Array(new Uint8Array(b).buffer); };
const found = JSON.parse(stated).map(({ codec, clip_norm }, i) => {
  const { data, rest } = formed({ codec, clip_norm }, floats('delta'), floats('residual'));
  writeFileSync(folder + '/' + i + '.bytes', data);
  if (rest) writeFileSync(folder + '/' + i + '.rest', new Uint8Array(rest.buffer));
  return rest !== null;
});
console.log(JSON.stringify(found));
"""
CODECS = ("float32", "float16", "int8", "topk:0.01", "topk:0.3", "topk:0.5", "ternary:0.02", "ternary:0.4")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("size", [1, 255, 5000])
def test_an_update_in_every_codec_is_the_bytes_that_python_makes(size: int, tmp_path: Path) -> None:
    random_ = np.random.default_rng(size)
    delta = (random_.standard_normal(size) * 10.0 ** random_.integers(-9, 6, size)).astype(np.float32)
    delta[size // 2 :][:300] = 0  # a block of nothing, and equal magnitudes
    residual = (random_.standard_normal(size) * np.abs(delta)).astype(np.float32)
    delta[:3] = [1.5, -0.0, 3e-8][:size]
    for name, vector in (("delta", delta), ("residual", residual)):
        (tmp_path / name).write_bytes(vector.tobytes())
    forms = [{"codec": codec, "clip_norm": clip} for codec in CODECS for clip in (0.0, 1.0)]
    feeding = script(FORMED, json.dumps(forms), tmp_path)
    for i, stated in enumerate(forms):
        form = UpdateForm(**stated)
        wanted = make_outgoing(form, delta, residual if form.how.feeds_back else NOTHING, random_)
        got = (tmp_path / f"{i}.bytes").read_bytes()
        assert feeding[i] == form.how.feeds_back
        if not form.clip_norm:  # a norm's last bit depends on the order of its sum
            assert got == wanted.data, stated
        said = decode(form.how, got, size)
        assert np.abs(said - wanted.said).max() <= 1e-6 + np.abs(wanted.said).max() / 127, stated
        if form.clip_norm:
            assert norm(said) <= form.clip_norm
        if feeding[i]:
            rest = np.frombuffer((tmp_path / f"{i}.rest").read_bytes(), np.float32)
            assert np.abs(said + rest - (wanted.said + wanted.residual)).max() < 1e-5 * (1 + np.abs(delta).max())


CSV = 'text,label,pair\n"play, please",music,\n"say ""hi""",alarm,second\r\nno label,,\n"two\nlines",lights,\n'


@pytest.mark.usefixtures("packages")
def test_examples_come_from_lines_of_json_or_from_csv(tmp_path: Path) -> None:
    rows = [("play, please", "music", None), ('say "hi"', "alarm", "second"), ("two\nlines", "lights", None)]
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t, "label": n, "pair": p}) for t, n, p in rows))
    code = """import { readExamples } from './examples.js';
        console.log(JSON.stringify(process.argv.slice(1).map(readExamples)));"""
    wanted = [{"text": t, "label": n, "pair": p} for t, n, p in rows]
    assert script(code, tmp_path / "a.csv", tmp_path / "a.jsonl") == [wanted, wanted]


# ---- a fleet ---------------------------------------------------------------------------------------------------------


class Node:
    """The client as a process whose lines can be waited for."""

    def __init__(self, *options: str | Path) -> None:
        command = ["node", "client.js", *map(str, options)]
        self.process = subprocess.Popen(
            command, cwd=EXAMPLE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                with self._news:
                    self.lines.append(line.rstrip())
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def line(self, part: str, times: int = 1) -> str:
        """The first (second, ...) line with that in it, as soon as it is there."""
        found: list[str] = []

        def look() -> bool:
            found[:] = [line for line in self.lines if part in line]
            return len(found) >= times or self._ended

        with self._news:
            self._news.wait_for(look, PATIENCE_S)
        assert len(found) >= times, f"no line with {part!r} in {self.lines[-20:]}"
        return found[times - 1]

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        return code


class Fleet:
    """A coordinator with certificate and publisher, Python devices and Node.js clients; all ended with the test."""

    def __init__(self, folder: Path, built: BuiltArtifact, dataset: Dataset) -> None:
        self.folder, self.dataset, self.built = folder, dataset, built
        self.store = Store(str(folder / "fleet.db"))
        tls = make_certificates(folder / "certs", ["127.0.0.1"])
        with self.store.write() as session:
            keys = signing.create_keys(session, folder / "keys")
            publish_artifact(session, built, "stable", "full", keys)
            newest = signing.newest_list(session)
            assert newest is not None
            self.root = newest.publisher
        config = ServerConfig("127.0.0.1:0", lease_s=5.0, tls=tls, enrolment_key="open sesame")
        self.server = CoordinatorServer(self.store, config, folder / "spool")
        self.port = self.server.start()
        self.devices: list[Device] = []
        self.nodes: list[Node] = []
        self.proxies: list[Proxy] = []

    def own_examples(self, index: int) -> tuple[Example, ...]:
        return tuple(self.dataset.train[22 * index : 22 * index + 22])

    def python(self, index: int) -> Device:
        device = Device(
            f"127.0.0.1:{self.port}",
            self.folder / f"python-{index}",
            name=f"python-{index}",
            ca=self.folder / "certs" / "ca.pem",
            publisher=self.root,
            enrolment_key="open sesame",
        )
        device.add_examples((e.text, e.label) for e in self.own_examples(index))
        self.devices.append(device)
        device.start()
        return device

    def node(
        self, examples: Sequence[Example], *more: str, home: str = "node", name: str = NAME, port: int = 0
    ) -> Node:
        path = self.folder / f"{home}.jsonl"
        lines = ({"text": e.text, "label": e.label, "pair": e.text_pair} for e in examples)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        node = Node(
            "--coordinator", f"127.0.0.1:{port or self.port}", "--examples", path, "--home", self.folder / home,
            "--name", name, "--ca", self.folder / "certs" / "ca.pem", "--enrolment-key", "open sesame",
            *(more or ("--publisher", self.root)),
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def drive(self, should_stop: Callable[[], bool] = lambda: False, **settings: Any) -> int:
        """A run from its beginning to its end; its number."""
        standard: dict[str, Any] = {"rounds": 2, "seed": 3, "wait_s": PATIENCE_S, "local": LOCAL, "release": False}
        self.config = RunConfig(**(standard | {"retain_updates": True} | settings))
        self.run_id = create_run(self.store, self.config)
        self.go_on(should_stop)
        return self.run_id

    def go_on(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        size = int(self.built.manifest["trainable_sets"][self.config.trainable_set or "full"]["size"])
        grid = FleetGrid(
            self.server.assignments, self.run_id, lambda: self.server.online("stable"), size, self.server.config.lease_s
        )
        drive_run(self.store, self.run_id, grid, self.config, should_stop=should_stop)

    def restart(self) -> None:
        """The coordinator ends and comes again, at the same address; more patient, so that a busy machine costs no lease."""
        self.server.stop()
        config = dataclasses.replace(self.server.config, listen=f"127.0.0.1:{self.port}", lease_s=60.0)
        self.server = CoordinatorServer(self.store, config, self.folder / "spool")
        self.server.start()

    def assignments(self, name: str = NAME) -> list[Assignment]:
        """Of the newest run."""
        with self.store.read() as session:
            mine = sa.select(Assignment).join(DeviceRow).where(DeviceRow.name == name)
            return list(session.scalars(mine.where(Assignment.run_id == self.run_id).order_by(Assignment.round)))

    def close(self) -> None:
        for device in self.devices:
            device.close()
        for node in self.nodes:
            node.end(signal.SIGKILL)
        for proxy in self.proxies:
            proxy.close()
        self.server.stop()
        self.store.close()


@pytest.fixture(scope="module")
def fleet(
    packages: None, tmp_path_factory: pytest.TempPathFactory, nano_built: BuiltArtifact, tiny_dataset: Dataset
) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"), nano_built, tiny_dataset)
    yield made
    made.close()


@pytest.fixture
def own_fleet(packages: None, tmp_path: Path, nano_built: BuiltArtifact, tiny_dataset: Dataset) -> Iterator[Fleet]:
    """For a test that breaks something."""
    made = Fleet(tmp_path, nano_built, tiny_dataset)
    yield made
    made.close()


# ---- the same update ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tiny_dataset: Dataset) -> tuple[Example, ...]:
    """Pairs, a text that is cut, two of one length, and a label that the artifact does not know."""
    plain = tiny_dataset.train[50:70]
    return (
        *plain,
        Example(LONG, "lights"),
        Example("unheard of", "cooking"),
        Example("Play 中文 jazz, né?", "music", text_pair="on the radio"),
        Example(LONG, "weather", text_pair=LONG),
    )


@pytest.fixture(scope="module")
def three(fleet: Fleet, texts: tuple[Example, ...]) -> Fleet:
    """Two Python devices and one in Node.js, at work."""
    for index in (0, 1):
        fleet.python(index)
    fleet.node(texts).line("adopted release")
    return fleet


def in_python(
    fleet: Fleet,
    artifact: Artifact,
    found: Assignment,
    set_name: str,
    texts: Sequence[Example],
    form: UpdateForm | None = None,
    kept: Kept | None = None,
) -> Reply:
    """What the Python device makes of the same assignment, name and examples."""
    trainer = PlanTrainer(artifact, set_name)
    config = TrainConfig.from_mapping(found.config)
    usable = [e for e in texts if e.label in artifact.manifest.labels]
    examples: Examples = encode_examples(trainer, usable, config.max_length)
    with fleet.store.read() as session:
        theta = decode_vector("theta", get_blob(session, found.parameters), trainer.size)
    kind: Kind = "train" if found.kind == "train" else "evaluate"
    return perform(trainer, Task(kind, theta, config, found.round, NAME, form or UpdateForm()), examples, kept=kept)


def decided(artifact: Artifact, set_name: str) -> NDArray[np.bool_]:
    """Where in theta a gradient is more than rounding: a key's bias moves all scores of a softmax alike, so it changes
    nothing, and AdamW makes steps of that nothing in directions that no two builds of a runtime share."""
    manifest = json.loads(artifact.path("manifest.json").read_text())
    mask = np.ones(manifest["trainable_sets"][set_name]["size"], np.bool_)
    for parameter in manifest["trainable_sets"][set_name]["parameters"]:
        if parameter["name"].endswith("attention.self.key.bias"):
            mask[parameter["offset"] :][: int(np.prod(parameter["shape"]))] = False
    assert mask.mean() > 0.99
    return mask


RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "adamw, every epoch in another order, cosine after a warm-up, clipped, FedProx": (
        "full",
        {
            "epochs": 3, "batch_size": 3, "schedule": "cosine", "warmup": 0.25, "max_grad_norm": 0.5,
            "proximal_mu": 0.3, "weight_decay": 0.05,
        },
        {"evaluate_on_devices": True},
    ),
    "sgd with momentum, linear, smoothed labels": (
        "norms",
        {
            "epochs": 2, "batch_size": 2, "optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.02,
            "schedule": "linear", "label_smoothing": 0.2,
        },
        {},
    ),
    "a holdout with patience, texts cut to 12 tokens": (
        "lora:4",
        {"epochs": 9, "batch_size": 4, "learning_rate": 0.02, "holdout": 0.25, "patience": 1, "max_length": 12},
        {},
    ),
    "fewer steps than an epoch has, one example a batch": (
        "head",
        {"batch_size": 1, "max_steps": 9, "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "epochs": 2},
        {"rounds": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RUNS)
def test_its_update_is_a_python_devices_update(
    what: str, three: Fleet, nano_artifact: Artifact, texts: tuple[Example, ...]
) -> None:
    set_name, local, settings = RUNS[what]
    config = LocalTraining(**({"learning_rate": 0.002, "max_length": 32} | local))
    run_id = three.drive(trainable_set=set_name, local=config, min_devices=3, **settings)
    with three.store.read() as session:
        assert session.get_one(Run, run_id).status == "finished"
        rounds = session.scalars(sa.select(Round).where(Round.run_id == run_id, Round.number > 0)).all()
        assert [(r.devices, r.failed) for r in rounds] == [(3, 0)] * len(rounds)
    mine = three.assignments()
    assert {a.status for a in mine} == {"aggregated"}
    assert len(mine) == len(rounds) * (1 + bool(settings.get("evaluate_on_devices")))
    for found in mine:
        with three.store.read() as session:
            update = session.get_one(Update, found.id)
        wanted = in_python(three, nano_artifact, found, set_name, texts)
        assert update.num_examples == wanted.num_examples == 23
        assert set(update.metrics) == set(wanted.metrics) | ({"seconds"} if found.kind == "train" else set())
        for name in set(wanted.metrics) - {"seconds"}:
            assert update.metrics[name] == pytest.approx(wanted.metrics[name], abs=CLOSE), name
        if found.kind == "evaluate":
            assert update.bytes == 0
            continue
        data = three.server.assignments.upload_path(found.id).read_bytes()
        delta = decode_vector("delta", data, wanted.delta.size)
        assert data == encode_vector("delta", delta), "the same safetensors header"
        assert np.abs(delta - wanted.delta)[decided(nano_artifact, set_name)].max() < CLOSE
        assert np.abs(wanted.delta).max() > 20 * CLOSE, "an update that was not made would be seen"


def same_in_form(
    fleet: Fleet, artifact: Artifact, set_name: str, texts: Sequence[Example], form: UpdateForm
) -> list[Reply]:
    """Compare all updates of the newest run with what a Python device makes, one after the other; and give those."""
    made: list[Reply] = []
    for found in fleet.assignments():
        assert found.status == "aggregated"
        wanted = in_python(fleet, artifact, found, set_name, texts, form, made[-1].kept if made else None)
        made.append(wanted)
        data = fleet.server.assignments.upload_path(found.id).read_bytes()
        assert len(data) == len(wanted.data)
        said = decode(form.how, data, wanted.delta.size)
        step = np.abs(wanted.delta).max() / (1024 if form.codec == "float16" else 127)
        assert np.abs(said - wanted.delta).max() <= 1.01 * step + 1e-7
        assert (np.abs(said - wanted.delta) > step / 2).mean() < 0.003, "but for values between two steps"
        assert norm(said) <= (form.clip_norm or np.inf)
    return made


@pytest.mark.parametrize("codec", ["float16", "int8", "topk:0.05", "ternary:0.1"])
def test_its_update_is_a_python_devices_update_in_the_runs_form(
    codec: str, three: Fleet, nano_artifact: Artifact, texts: tuple[Example, ...]
) -> None:
    """Three rounds: what error feedback left out of one goes into the next. The clip takes about half of each."""
    form = UpdateForm(codec, clip_norm=0.02, metrics=("loss", "steps"))
    local = LocalTraining(batch_size=4, learning_rate=0.005, max_length=32, optimizer="sgd", momentum=0.9)
    declared = RunForm(codec=codec, clip_norm=form.clip_norm, metrics=form.metrics)
    three.drive(trainable_set="norms", local=local, min_devices=3, rounds=3, update=declared)
    made = same_in_form(three, nano_artifact, "norms", texts, form)
    assert len(made) == 3
    assert form.how.feeds_back == all(np.any(reply.kept.residual) for reply in made)
    assert norm(made[0].delta) > 0.9 * form.clip_norm or ":" in codec, "it was clipped"
    with three.store.read() as session:
        assert all(set(session.get_one(Update, found.id).metrics) == {"loss", "steps"} for found in three.assignments())


def test_it_predicts_with_the_release_it_has_adopted(
    three: Fleet, nano_artifact: Artifact, texts: tuple[Example, ...]
) -> None:
    trainer = PlanTrainer(nano_artifact, "full")
    three.nodes[0].line("adopted release 1")
    code = f"""import {{ Device }} from './device.js';
        const [, home, texts] = process.argv;
        const about = {{ coordinator: '127.0.0.1:1', home, publisher: '{three.root}', channel: 'stable' }};
        const device = new Device({{ ...about, examples: [], say: () => null }});
        const labels = [];
        for (const text of JSON.parse(texts)) labels.push(await device.predict(text));
        console.log(JSON.stringify(labels));"""
    asked = [e.text for e in texts[:8]]
    rows = trainer.encode(asked)
    logits = [trainer.logits(trainer.initial_theta(), r[None], np.ones((1, len(r)), np.int64))[0] for r in rows]
    labels = [nano_artifact.manifest.labels[int(row.argmax())] for row in logits]
    assert script(code, three.folder / "node", json.dumps(asked)) == labels


UPPER = "norms@1"  # of the upper one of two blocks: the prefix keeps a row a token


@pytest.fixture(scope="module")
def upper(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    vocabulary = train_vocabulary((e.text for e in tiny_dataset.train), 256)
    built = build_artifact(
        tmp_path_factory.mktemp("upper") / "artifact",
        config=STUDENTS["nano"].with_changes(vocab_size=len(vocabulary)),
        state={},
        vocabulary=vocabulary,
        labels=tiny_dataset.labels,
        trainable_sets=(UPPER,),
        quantized=True,
        max_length=32,
        seed=5,
    )
    return open_artifact(built.folder, built.version)


TRAIN = """
import { readFileSync, writeFileSync } from 'node:fs';
import { Plans } from './plans.js';
import { train } from './training.js';
import { decodeVector, encodeVector } from './vector.js';
const [, folder, set, asked, out] = process.argv;
const { examples, config, seed } = JSON.parse(asked);
const manifest = JSON.parse(readFileSync(folder + '/manifest.json'));
const plans = new Plans(folder, manifest, set);
const theta = decodeVector('theta', readFileSync(folder + '/' + plans.set.initial), plans.set.size);
const { delta } = await train(plans, theta, plans.encode(examples, 32), config, BigInt(seed), () => null);
writeFileSync(out, encodeVector('delta', delta));
console.log(JSON.stringify(plans.set.keeps_tokens));
"""


@pytest.mark.usefixtures("packages")
def test_with_a_prefix_that_keeps_tokens_it_trains_the_suffix_alike(
    upper: Artifact, texts: tuple[Example, ...], tmp_path: Path
) -> None:
    config = TrainConfig(epochs=2, batch_size=5, learning_rate=0.01, holdout=0.2, seed=2**63, max_length=32)
    known = [e for e in texts if e.label in upper.manifest.labels]
    trainer = PlanTrainer(upper, UPPER)
    wanted = train(trainer, trainer.initial_theta(), encode_examples(trainer, known, 32), config).delta
    examples = [{"text": e.text, "label": e.label, "pair": e.text_pair} for e in known]
    asked = json.dumps({"examples": examples, "config": dataclasses.asdict(config), "seed": str(config.seed)})
    assert script(TRAIN, upper.folder, UPPER, asked, tmp_path / "delta") is True
    got = decode_vector("delta", (tmp_path / "delta").read_bytes(), trainer.size)
    assert np.abs(got - wanted).max() < CLOSE
    assert np.abs(wanted).max() > 20 * CLOSE


# ---- what breaks -----------------------------------------------------------------------------------------------------


class Proxy:
    """Between a device and the coordinator: after so many bytes from the device it cuts the connection, or holds them."""

    def __init__(self, port: int, after: int, hold: bool = False) -> None:
        self._port, self._after, self._hold = port, after, hold
        self.reached = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
                coordinator = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            self._open += [device, coordinator]
            threading.Thread(target=self._forward, args=(device, coordinator, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(coordinator, device, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        passed = 0
        try:
            while data := source.recv(4096):
                passed += len(data)
                if upwards and passed > self._after and not self.reached.is_set():
                    self.reached.set()
                    if self._hold:
                        return
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()

    def close(self) -> None:
        for end in (self._listener, *self._open):
            end.close()


def running(fleet: Fleet, **settings: Any) -> tuple[threading.Thread, threading.Event]:
    """A run driven by a thread, and what stops it."""
    stop = threading.Event()

    def drive() -> None:
        with contextlib.suppress(Interrupted):
            fleet.drive(stop.is_set, **settings)

    thread = threading.Thread(target=drive)
    thread.start()
    return thread, stop


ONE = {"rounds": 1, "min_devices": 1}
HALF = 150_000  # bytes: some 64 KiB parts of an update of 57,124 values, and never as much before


def audit(fleet: Fleet) -> list[str]:
    with fleet.store.read() as session:
        return [f"{row.act} {row.detail}" for row in audit_lines(session)]


def accepted_whole(fleet: Fleet) -> None:
    (mine,) = fleet.assignments()
    assert mine.status == "aggregated"
    data = fleet.server.assignments.upload_path(mine.id).read_bytes()
    with fleet.store.read() as session:
        assert hashlib.sha256(data).hexdigest() == session.get_one(Update, mine.id).digest


def test_an_upload_that_is_cut_off_goes_on_where_it_was(own_fleet: Fleet, texts: tuple[Example, ...]) -> None:
    proxy = Proxy(own_fleet.port, HALF)
    own_fleet.proxies.append(proxy)
    node = own_fleet.node(texts, port=proxy.port)
    own_fleet.drive(**ONE)
    assert proxy.reached.is_set()
    starts = [int(line.split()[3]) for line in node.lines if line.startswith("uploading from byte ")]
    assert starts[0] == 0 < starts[-1], node.lines
    accepted_whole(own_fleet)
    assert sum("training on" in line for line in node.lines) == 1


def test_a_client_killed_while_it_uploads_goes_on_without_training_again(
    own_fleet: Fleet, texts: tuple[Example, ...]
) -> None:
    proxy = Proxy(own_fleet.port, HALF, hold=True)
    own_fleet.proxies.append(proxy)
    node = own_fleet.node(texts, port=proxy.port)
    thread, _ = running(own_fleet, **ONE)
    assert proxy.reached.wait(PATIENCE_S)
    node.end(signal.SIGKILL)
    proxy.close()
    again = own_fleet.node(texts)
    thread.join(PATIENCE_S)
    assert int(again.line("uploading from byte").split()[3]) > 0
    accepted_whole(own_fleet)
    assert not any("training on" in line or "enrolled" in line for line in again.lines)


def test_what_a_killed_client_left_out_of_its_update_is_sent_in_the_next_round_once(
    own_fleet: Fleet, nano_artifact: Artifact, texts: tuple[Example, ...]
) -> None:
    proxy = Proxy(own_fleet.port, 40_000, hold=True)  # of 57,124 bytes and some calls
    own_fleet.proxies.append(proxy)
    node = own_fleet.node(texts, port=proxy.port)
    local = LocalTraining(batch_size=4, learning_rate=0.02, max_length=32, optimizer="sgd")
    thread, _ = running(own_fleet, **ONE | {"rounds": 2}, local=local, update=RunForm(codec="int8"))
    assert proxy.reached.wait(PATIENCE_S)
    node.end(signal.SIGKILL)
    proxy.close()
    again = own_fleet.node(texts)
    thread.join(PATIENCE_S)
    again.line("handed in round 2")
    assert sum("training on" in line for line in again.lines) == 1, "in round 2 only"
    first, second = same_in_form(own_fleet, nano_artifact, "full", texts, UpdateForm("int8"))
    assert np.any(first.kept.residual)
    assert np.any(second.kept.residual)


def test_a_coordinator_that_ends_and_comes_again_gets_the_same_update(
    own_fleet: Fleet, nano_artifact: Artifact, texts: tuple[Example, ...]
) -> None:
    node = own_fleet.node(texts)
    local = LocalTraining(epochs=40, batch_size=4, learning_rate=1e-4, max_length=32)
    thread, stop = running(own_fleet, **ONE, trainable_set="norms", local=local)
    node.line("training on 23 examples")
    stop.set()
    thread.join(PATIENCE_S)
    own_fleet.restart()
    own_fleet.go_on()
    accepted_whole(own_fleet)
    (mine,) = own_fleet.assignments()
    wanted = in_python(own_fleet, nano_artifact, mine, "norms", texts)
    data = own_fleet.server.assignments.upload_path(mine.id).read_bytes()
    assert np.abs(decode_vector("delta", data, wanted.delta.size) - wanted.delta).max() < CLOSE
    assert sum("training on" in line for line in node.lines) == 1


def test_a_chunk_with_another_digest_is_not_kept_and_the_download_goes_on_once_it_is_right(
    own_fleet: Fleet, texts: tuple[Example, ...]
) -> None:
    digest = own_fleet.built.manifest["files"]["tokenize.onnx"]["chunks"][0]
    with own_fleet.store.write() as session:
        chunk = session.get_one(Chunk, digest)
        good = chunk.data
        chunk.data = good[:-1] + bytes([good[-1] ^ 1])
    node = own_fleet.node(texts)
    node.line("will try again: chunk 0 of tokenize.onnx has another digest; it was not kept")
    with own_fleet.store.write() as session:
        session.get_one(Chunk, digest).data = good
    node.line("adopted release 1")
    assert sum("fetching train-full.onnx from chunk 0" in line for line in node.lines) == 1, "what is whole is kept"


def test_nothing_of_another_publisher_or_of_none_is_run(own_fleet: Fleet, texts: tuple[Example, ...]) -> None:
    node = own_fleet.node(texts, "--publisher", "ab" * 32)
    node.line(f"will try again: the list of keys is of {own_fleet.root}, but {'ab' * 32} is pinned; it is not used")
    assert node.end() == 0
    assert not (own_fleet.folder / "node" / "artifacts").exists()
    with own_fleet.store.write() as session:
        for table in (tables.Signature, tables.KeyList):
            session.execute(sa.delete(table))
    unsigned = own_fleet.node(texts, "--publisher", own_fleet.root, home="other", name="other")
    unsigned.line("keeps its model: no valid key of the publisher stands for artifact")
    end = time.monotonic() + PATIENCE_S
    while not (noted := [line for line in audit(own_fleet) if "release.refused" in line]) and time.monotonic() < end:
        time.sleep(0.05)
    assert "no valid key of the publisher stands for" in noted[0], "the operator hears why"
    assert not (own_fleet.folder / "other" / "artifacts").exists()


def test_it_stops_when_nobody_wants_the_update_and_declines_what_it_must_leave(
    own_fleet: Fleet, texts: tuple[Example, ...]
) -> None:
    node = own_fleet.node(texts)
    node.line("adopted")
    long = LocalTraining(epochs=1000, batch_size=1, learning_rate=1e-5, max_length=32)
    thread, stop = running(own_fleet, **ONE | {"local": long, "max_attempts": 2, "deadline_s": 300})
    node.line("training on 23 examples")
    (first,) = own_fleet.assignments()
    own_fleet.server.assignments.expire([first.id], "the round had enough")
    node.line("round 1 wants no more of this device")
    node.line("training on 23 examples", 2)
    assert node.end() == 0
    assert node.lines[-1] == "stopped"
    stop.set()
    thread.join(PATIENCE_S)
    assert [(a.status, a.error) for a in own_fleet.assignments()] == [
        ("expired", "the round had enough"),
        ("failed", "the app stopped the device"),
    ]
