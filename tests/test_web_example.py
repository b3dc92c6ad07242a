"""examples/web: the same artifact in Node.js and in a browser, against the device's own code."""

from __future__ import annotations

import functools
import http.server
import json
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import screenshot
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.optimizers import AdamW, Optimizer, make_optimizer
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.tokenizer import PlanTokenizer
from pocketfed.client_sdk.trainer import Batch
from pocketfed.model.parameters import Vector, decode_vector, encode_vector
from pocketfed.model.tokenization import SPECIAL_TOKENS, Vocabulary, build_tokenize_plan

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "web"
PACKAGE: dict[str, Any] = json.loads((EXAMPLE / "package.json").read_text())
CLOSE = 1e-4  # two builds of ONNX Runtime, one of them WebAssembly
TEXTS = ("wake me at noon", "please play some jazz", "dim the hall light")
LABELS = ("alarm", "music", "lights")
PAIRS = (None, "on the radio", None)
LETTERS = "aàbcdéßøñçžабвασς中文日語한국אבגمرहि😀👍🏽0123456789.,!?#[]-_"
PARTS = (
    "hello", "hellos", "HELLO", "Å", "A\u030a", "\u0300\u0301", "İ", "ǅ", "ﬃ", "ς", "Σ", "中文", "𠀀", "カ\u3099", "한",
    "\u1100\u1161", "שָׁלוֹם", "السَّلامُ", "\u202e", "\u200d", "\u200b", "\ufeff", "\x00", "\x7f", "\u00ad", " ", "\u00a0",
    "\u2028", "\t", "\n", "👨‍👩‍👧", "🇩🇪", "👍🏽", "\ufffd", "\ud800", "\udfff", "\U0010ffff", "\U0010fffd", "[SEP]", "[UNK]", "##s",
    "#", "_", "¿", "a" * 100, "a" * 101, "é" * 100, "e\u0301" * 101, "hello" * 20 + "s", "q\u0323\u0307",
)  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not on the PATH; install Node.js 20")


def node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # WebAssembly compiled quickly, not well: a test runs it for a moment
    command = ["node", "--liftoff-only", *map(str, arguments)]
    return subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False, timeout=120)


def script(code: str, *arguments: str | Path) -> Any:
    """What a module beside pocketfed.js prints as JSON; `arguments` are its process.argv from 1 on."""
    done = node("--input-type=module", "-e", code, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def packages() -> Path:
    """The example's node_modules, as `npm install` makes them."""
    wanted = PACKAGE["dependencies"] | PACKAGE["optionalDependencies"]
    stated = [EXAMPLE / "node_modules" / name / "package.json" for name in wanted]
    if not all(p.is_file() and json.loads(p.read_text())["version"] == wanted[p.parent.name] for p in stated):
        if shutil.which("npm") is None:
            pytest.skip("npm is not on the PATH, and examples/web has no node_modules")
        command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0"]
        done = subprocess.run(command, cwd=EXAMPLE, capture_output=True, text=True, check=False, timeout=300)
        if not all(p.is_file() for p in stated):
            pytest.skip(f"npm cannot install what examples/web needs: {done.stderr.strip()[-200:]}")
    return EXAMPLE / "node_modules"


# ---- tokens ----------------------------------------------------------------------------------------------------------

ENCODE = """
import { readFileSync, writeFileSync } from 'node:fs';
import { Tokenizer } from './tokenizer.js';
const [, plan, calls, out] = process.argv;
const tokenizer = new Tokenizer(new Uint8Array(readFileSync(plan)), 1 << 20);
const found = JSON.parse(readFileSync(calls)).map(([texts, pairs, length]) => tokenizer.encode(texts, pairs, length));
writeFileSync(out, Buffer.concat(found.flatMap(({ ids, mask }) => [Buffer.from(ids.buffer), Buffer.from(mask.buffer)])));
console.log(JSON.stringify(found.map(({ shape }) => shape)));
"""
Call = tuple[list[str], list[str | None] | None, int]


class Tokenizers:
    """The device's and the page's, on one plan."""

    def __init__(self, vocabulary: Vocabulary, folder: Path) -> None:
        self.folder, self.plan = folder, folder / "tokenize.onnx"
        self.plan.write_bytes(build_tokenize_plan(vocabulary))
        self.device = PlanTokenizer(self.plan)

    def agree(self, calls: list[Call]) -> None:
        # UTF-16 cannot tell two lone halves side by side from one character; JavaScript's strings are UTF-16
        joined = json.loads(json.dumps(calls).encode())
        questions, answers = self.folder / "calls.json", self.folder / "answers.bin"
        questions.write_text(json.dumps(joined))
        shapes = script(ENCODE, self.plan, questions, answers)
        numbers, at = np.fromfile(answers, "<i8"), 0
        for (texts, pairs, length), shape in zip(joined, shapes, strict=True):
            for wanted in self.device.encode(texts, pairs, length):
                assert list(wanted.shape) == shape
                got = numbers[at : at + wanted.size].reshape(shape)
                at += wanted.size
                for row in np.flatnonzero((got != wanted).any(1)):
                    assert got[row].tolist() == wanted[row].tolist(), (texts[row], pairs and pairs[row], length)
        assert at == len(numbers) > 0


@pytest.fixture(scope="module", params=[True, False], ids=["lower", "cased"])
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    letters = LETTERS if request.param else LETTERS + "AÀBÉŽАΣ"
    words = ("hello", "##s", "##hello", "ab", "##ab", "abc", "##c中", "q\u0323", "constructor", "__proto__", "007")
    tokens = (*SPECIAL_TOKENS, *letters, *(f"##{c}" for c in letters), *words)
    return Tokenizers(Vocabulary(tuple(dict.fromkeys(tokens)), request.param), tmp_path_factory.mktemp("tokens"))


def test_every_code_point_gives_the_same_tokens(tokenizers: Tokenizers) -> None:
    blocks = ["".join(f"a{chr(c)}b " for c in range(start, start + 256)) for start in range(0, 0x110000, 256)]
    tokenizers.agree([(blocks, None, 1 << 20)])


def test_thousands_of_hostile_texts_and_pairs_give_the_same_tokens(tokenizers: Tokenizers) -> None:
    random_ = random.Random(11)

    def text() -> str:
        parts = [random_.choice(PARTS) if random_.random() < 0.5 else random_.choice(LETTERS) for _ in range(8)]
        parts += [chr(random_.choice((random_.randrange(0x3100), random_.randrange(0x110000)))) for _ in range(3)]
        return "".join(random_.sample(parts, random_.randrange(len(parts))))

    calls: list[Call] = [([text() for _ in range(500)], None, length) for length in (3, 4, 7, 16, 128)]
    for length in (3, 4, 5, 6, 7, 8, 13, 64):
        pairs = [text() if random_.random() < 0.8 else None for _ in range(500)]
        calls.append(([text() for _ in range(500)], pairs, length))
    tokenizers.agree([*calls, (["constructor __proto__ 007 toString"], None, 64), (["", " "], ["", None], 5)])


# ---- optimizers ------------------------------------------------------------------------------------------------------

STEPS = """
import { adamw, sgd } from './pocketfed.js';
const [start, gradients] = JSON.parse(process.argv[1]);
const made = { sgd: sgd(0.05), momentum: sgd(0.05, 0.9), adamw: adamw(0.01), decay: adamw(0.01, 0.1) };
const walk = (step) => gradients.reduce((theta, g) => step(theta, Float32Array.from(g)), Float32Array.from(start));
console.log(JSON.stringify(Object.fromEntries(Object.entries(made).map(([name, step]) => [name, [...walk(step)]]))));
"""


def test_optimizers_take_the_same_steps_bit_for_bit() -> None:
    random_ = np.random.default_rng(3)
    start = random_.normal(size=64).astype(np.float32)
    gradients = random_.normal(size=(20, 64)).astype(np.float32)
    found = script(STEPS, json.dumps([start.tolist(), gradients.tolist()]))
    made: dict[str, Optimizer] = {
        "sgd": make_optimizer("sgd", 0.05, 0.0, 0.0),
        "momentum": make_optimizer("sgd", 0.05, 0.9, 0.0),
        "adamw": AdamW(0.01),
        "decay": AdamW(0.01, 0.1),
    }
    assert set(found) == set(made)
    for name, optimizer in made.items():
        theta = start.copy()
        for gradient in gradients:
            optimizer.step(theta, gradient.copy())
        assert np.array_equal(np.array(found[name], np.float32), theta), name


# ---- the artifact, in Node.js ----------------------------------------------------------------------------------------


def batch_of(trainer: PlanTrainer, texts: tuple[str, ...], labels: tuple[str, ...], pairs: Any = None) -> Batch:
    rows = trainer.encode(texts, pairs)
    width = max(map(len, rows))
    ids = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    return Batch(ids, mask, np.array([trainer.artifact.manifest.labels.index(label) for label in labels], np.int64))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    rows = [{"text": t, "label": n, "pair": p} for t, n, p in zip(TEXTS, LABELS, PAIRS, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("runtime", ["node", "web"])
@pytest.mark.parametrize("name", ["full", "norms", "lora:4", "head"])
@pytest.mark.usefixtures("packages")
def test_a_step_in_javascript_is_the_devices_step(
    nano_artifact: Artifact, examples: Path, tmp_path: Path, runtime: str, name: str
) -> None:
    out = tmp_path / "theta.safetensors"
    options = ("--set", name, "--runtime", runtime, "--optimizer", "sgd", "--learning-rate", "0.05", "--out", out)
    done = node("demo.mjs", nano_artifact.folder, examples, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    trainer = PlanTrainer(nano_artifact, name)
    theta: Vector = trainer.initial_theta()
    batch = batch_of(trainer, TEXTS, LABELS, PAIRS)
    assert found["version"] == nano_artifact.manifest.version
    assert found["runtime"].endswith(
        " " + (PACKAGE["dependencies"] | PACKAGE["optionalDependencies"])[f"onnxruntime-{runtime}"]
    )
    assert found["ids"] == [row.tolist() for row in trainer.encode(TEXTS, PAIRS)]
    probabilities = softmax(trainer.logits(theta, batch.ids, batch.mask))
    assert np.abs(np.array([p["probabilities"] for p in found["predictions"]]) - probabilities).max() < CLOSE
    labels = nano_artifact.manifest.labels
    assert [p["label"] for p in found["predictions"]] == [labels[i] for i in probabilities.argmax(1)]

    loss, correct, gradient = trainer.gradient(theta, batch)
    assert found["steps"] == [{"loss": pytest.approx(loss, abs=CLOSE), "correct": correct}]
    make_optimizer("sgd", 0.05, 0.0, 0.0).step(theta, gradient)
    assert np.abs(theta - trainer.initial_theta()).max() > 100 * CLOSE  # so that a step not taken would be seen
    got = decode_vector("theta", out.read_bytes(), trainer.size)
    assert np.abs(got - theta).max() < CLOSE
    assert out.read_bytes() == encode_vector("theta", got)
    after, correct, _ = trainer.gradient(theta, batch)
    assert found["after"] == {"loss": pytest.approx(after, abs=CLOSE), "correct": correct}


@pytest.mark.usefixtures("packages")
def test_twenty_steps_lower_the_loss(nano_artifact: Artifact, examples: Path) -> None:
    done = node("demo.mjs", nano_artifact.folder, examples, "--set", "norms", "--steps", "20", "--runtime", "web")
    found = json.loads(done.stdout)
    assert len(found["steps"]) == 20
    assert found["after"]["loss"] < found["steps"][0]["loss"] / 2
    assert found["after"]["correct"] == 3


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(nano_artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_artifact.folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["backbone.bin", "predict-lora-4.onnx", "tokenize.onnx"])
@pytest.mark.usefixtures("packages")
def test_one_flipped_bit_in_any_file_is_one_sentence(copy: Path, examples: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    done = node("demo.mjs", copy, examples, "--set", "head")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{name} is damaged: its digest is not the manifest's; fetch the artifact again\n"


@pytest.mark.usefixtures("packages")
def test_a_cut_file_an_unknown_set_label_or_schema_are_one_sentence_each(copy: Path, examples: Path) -> None:
    unknown = node("demo.mjs", copy, examples, "--set", "last:2").stderr
    assert unknown == "the artifact has no trainable set last:2, only full, head, lora:4, norms\n"
    examples.write_text('{"text": "hello", "label": "cooking"}')
    label = node("demo.mjs", copy, examples).stderr
    assert label == 'there is no label "cooking"; choose one of alarm, lights, music, weather\n'
    size = (copy / "backbone.bin").stat().st_size
    (copy / "backbone.bin").write_bytes(b"\0" * (size - 1))
    cut = node("demo.mjs", copy, examples).stderr
    assert cut == f"backbone.bin has {size - 1} bytes, not {size}; fetch the artifact again\n"
    (copy / "manifest.json").write_text('{"schema": 99}')
    assert "the manifest has schema 99" in node("demo.mjs", copy, examples).stderr


FAILED_STEP = """
import * as ort from 'onnxruntime-web/wasm';
import { openArtifact, sgd } from './pocketfed.js';
const artifact = await openArtifact(ort, process.argv[1], process.argv[2]);
const trainer = await artifact.trainer('head');
const before = trainer.theta;
const said = [];
const refuse = async (work) => { try { await work(); } catch (error) { said.push(error.message); } };
await refuse(() => openArtifact(ort, process.argv[1], '0'.repeat(64)));
await refuse(() => artifact.read('../secret'));
await refuse(() => artifact.run(artifact.manifest.trainable_sets.head.train, {}));
await refuse(() => trainer.step(sgd(1), ['one text'], []));
trainer.theta = before.map(() => NaN);
const broken = trainer.theta;
await refuse(() => trainer.step(sgd(1), ['one text'], ['alarm']));
said.push(trainer.theta === broken);
trainer.theta = before.subarray(1);
await refuse(() => trainer.predict(['one text']));
console.log(JSON.stringify(said));
"""


@pytest.mark.usefixtures("packages")
def test_what_cannot_be_run_is_refused_and_a_failed_step_changes_nothing(nano_artifact: Artifact) -> None:
    version = nano_artifact.manifest.version
    other, path, unfed, uneven, nan, kept, short = script(FAILED_STEP, nano_artifact.folder.as_uri(), version)
    assert f"holds version {version[:12]}, not 000000000000" in other
    assert path == 'the artifact has no file "../secret"'
    assert unfed == "the plan train-head.onnx asks for theta, which is unknown here; update this page"
    assert uneven == "there are 1 texts and 0 labels; give at least one text, and a label for each"
    assert nan == "the loss is NaN or its gradient is not finite; take a smaller learning rate"
    assert kept is True
    assert short == "the plan predict-head.onnx takes theta as float32 of 260, not float32 of 259"


# ---- the page, in a browser ------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(nano_artifact: Artifact, packages: Path, tmp_path: Path) -> Iterator[str]:
    """A plain file server over the example, its packages and an artifact."""
    for path in (*EXAMPLE.glob("*.*"), packages):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "artifact").symlink_to(nano_artifact.folder)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def settled(driver: webdriver.Chrome, loss: str) -> str:
    """What the page says of the loss, once it is at rest and that begins with `loss`."""
    ready = "return document.body.dataset.state === 'ready' ? document.getElementById('loss').textContent : null"

    def there(_: webdriver.Chrome) -> bool:
        text = driver.execute_script(ready)
        return text is not None and text.startswith(loss)

    WebDriverWait(driver, 60, poll_frequency=0.05).until(there)
    assert driver.find_elements(By.CSS_SELECTOR, "[data-failed]") == []
    return driver.find_element(By.ID, "loss").text


@pytest.mark.skipif(screenshot.missing() is not None, reason=str(screenshot.missing()))
def test_the_page_predicts_and_learns_in_a_browser(nano_artifact: Artifact, site: str) -> None:
    trainer = PlanTrainer(nano_artifact, "norms")
    theta, batch, optimizer = trainer.initial_theta(), batch_of(trainer, TEXTS[:1], LABELS[:1]), AdamW(0.003)
    with screenshot.browsing(900, 900) as driver:
        driver.get(site)
        settled(driver, "")
        assert nano_artifact.manifest.version[:12] in driver.find_element(By.ID, "status").text
        Select(driver.find_element(By.ID, "set")).select_by_value("norms")
        driver.find_element(By.ID, "text").send_keys(TEXTS[0])
        Select(driver.find_element(By.ID, "label")).select_by_visible_text(LABELS[0])
        driver.find_element(By.ID, "add").click()
        shown = [settled(driver, "step 1:")]
        for step in range(2, 21):
            driver.find_element(By.ID, "again").click()
            shown.append(settled(driver, f"step {step}:"))
        losses = []
        for _ in shown:
            optimizer.step(theta, trainer.gradient(theta, batch)[2])
            losses.append(trainer.gradient(theta, batch)[0])
        got = [float(text.split("loss ")[1].split(",")[0]) for text in shown]
        assert got == pytest.approx(losses, abs=CLOSE + 5e-5)  # shown with four decimals
        assert got[-1] < got[0] / 2
        assert shown[-1].endswith("1 of 1 right")
        first = driver.find_element(By.CSS_SELECTOR, "#prediction li").text.split()
        probability = softmax(trainer.logits(theta, batch.ids, batch.mask))[0, 0]
        assert first[0] == LABELS[0]
        assert float(first[1]) == pytest.approx(100 * probability, abs=0.06)
        assert screenshot.contacted(driver) == {"127.0.0.1"}
        assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []


# ---- what is installed -----------------------------------------------------------------------------------------------


def test_npm_packages_are_pinned_exactly_and_without_a_lock_of_some_registry() -> None:
    for name, version in (PACKAGE["dependencies"] | PACKAGE["optionalDependencies"]).items():
        assert [part.isdigit() for part in version.split(".")] == [True] * 3, name
    assert "package-lock=false" in (EXAMPLE / ".npmrc").read_text()
    assert not (EXAMPLE / "package-lock.json").exists()
