"""Artifacts as a device meets them: hostile manifests, flipped bits, broken downloads, and the version naming all."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketfed.client_sdk.artifacts import (
    CHUNK_BYTES,
    MANIFEST,
    Artifact,
    fetch,
    open_artifact,
    parse_manifest,
)
from pocketfed.client_sdk.errors import ArtifactError, LinkError
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.coordinator.artifacts import BuiltArtifact, PublishError, build_artifact, manifest_bytes, read_artifact
from pocketfed.model.parameters import decode_vector

ONE = {"tokenize.onnx": b"t" * 10, "train.onnx": b"a" * 20, "predict.onnx": b"", "theta.safetensors": b"h" * 30}


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def describe(data: bytes) -> dict[str, Any]:
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    return {"sha256": digest_of(data), "bytes": len(data), "chunks": [digest_of(p) for p in pieces]}


def manifest(files: dict[str, bytes]) -> dict[str, Any]:
    plans = {"train": "train.onnx", "evaluate": "train.onnx", "predict": "predict.onnx"}
    upper = {
        "prefix": "predict.onnx",
        "train_suffix": "train.onnx",
        "evaluate_suffix": "train.onnx",
        "predict_suffix": "predict.onnx",
        "hidden_size": 16,
        "keeps_tokens": False,
    }
    needs = {name: {"weights": 1000, "activations": [1000, 10, 2, 1]} for name in ("train", "predict")}
    rows = [
        {"name": "classifier.weight", "shape": [2, 3], "offset": 0},
        {"name": "classifier.bias", "shape": [1], "offset": 6},
    ]
    more = {"name": "encoder.bias", "shape": [2], "offset": 7}
    head = {**plans, **upper, "initial": "theta.safetensors", "size": 7, "parameters": rows, "needs": needs}
    return {
        "schema": 2,
        "task": "classification",
        "labels": ["no", "yes"],
        "max_length": 16,
        "plans": {"tokenize": "tokenize.onnx"},
        "trainable_sets": {
            "head": head,
            "full": {**plans, "initial": "theta.safetensors", "size": 9, "parameters": [*rows, more], "needs": needs},
        },
        "files": {name: describe(data) for name, data in files.items()},
    }


class Shelf:
    """A Source over real bytes. It breaks off after `chunks_left` chunks and serves `tampered` chunks changed."""

    def __init__(self, *artifacts: dict[str, bytes]) -> None:
        self.versions: list[str] = []
        self.manifests: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.served: list[tuple[str, int]] = []
        self.chunks_left = 1 << 30
        self.tampered: set[tuple[str, int]] = set()
        self.change: Callable[[bytes], bytes] = lambda piece: piece[:-1] + bytes([piece[-1] ^ 1])
        for files in artifacts:
            data = manifest_bytes(manifest(files))
            self.versions.append(hashlib.sha256(data).hexdigest())
            self.manifests[self.versions[-1]] = data
            self.blobs |= {hashlib.sha256(b).hexdigest(): b for b in files.values()}

    def manifest(self, version: str) -> bytes:
        return self.manifests[version]

    def download(self, digest: str, first_chunk: int) -> Iterator[bytes]:
        data = self.blobs[digest]
        for index in range(first_chunk, -(-len(data) // CHUNK_BYTES)):
            if self.chunks_left == 0:
                raise LinkError("the line went dead")
            self.chunks_left -= 1
            self.served.append((digest, index))
            piece = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            yield self.change(piece) if (digest, index) in self.tampered else piece


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


BIG = noise(3 * CHUNK_BYTES + 123, seed=1)  # four chunks
LARGE = ONE | {"backbone.bin": BIG}


# ---- manifests -------------------------------------------------------------------------------------------------------


def test_a_manifest_is_read_as_written_and_its_version_is_the_digest_of_its_bytes() -> None:
    data = manifest_bytes(manifest(LARGE))
    parsed = parse_manifest(data)
    assert parsed.version == hashlib.sha256(data).hexdigest()
    assert parsed.labels == ("no", "yes")
    assert parsed.max_length == 16
    assert parsed.set_named("head").size == 7
    assert parsed.files["backbone.bin"].bytes == 3 * CHUNK_BYTES + 123
    assert len(parsed.files["backbone.bin"].chunks) == 4
    assert parsed.bytes == sum(len(b) for b in LARGE.values())
    with pytest.raises(ArtifactError, match="has no trainable set 'norms', only full, head"):
        parsed.set_named("norms")


def test_what_a_set_needs_and_where_it_is_cut_in_two_are_read() -> None:
    parsed = parse_manifest(manifest_bytes(manifest(LARGE)))
    assert parsed.task == "classification"
    head, full = parsed.set_named("head"), parsed.set_named("full")
    assert (head.prefix, head.train_suffix, head.evaluate_suffix) == ("predict.onnx", "train.onnx", "train.onnx")
    assert (head.hidden_size, head.keeps_tokens) == (16, False)
    assert (full.prefix, full.train_suffix, full.keeps_tokens) == ("", "", True)
    assert head.needs["train"].weights == 1000
    assert head.needs["train"].bytes(batch=3, tokens=4) == 1000 + 3 * (10 + 4 * (2 + 4))


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "..",
        ".",
        ".hidden",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:\\x",
        "",
        "n" * 101,
        "naïve",
        "a b",
        "a\0b",
        "*",
        "~",
        "a\n",
    ],
)
def test_fault_17_a_file_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    raw = manifest(ONE)
    raw["files"][name] = describe(b"x")
    with pytest.raises(ArtifactError, match="only plain names without folders"):
        parse_manifest(manifest_bytes(raw))


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    raw = manifest(ONE)
    change(raw)
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=1), "schema 1; this SDK reads 2: update the app"),
        (lambda r: r.update(schema=3), "schema 3; this SDK reads 2: update the app"),
        (lambda r: r.update(schema="2"), "schema '2'"),
        (lambda r: r.pop("task"), "incomplete or malformed"),
        (
            lambda r: r.update(task="poetry"),
            "task is 'poetry'; this SDK knows classification, regression, tokens, spans",
        ),
        (lambda r: r.update(task=["tokens"]), "task is"),
        (lambda r: r["trainable_sets"]["head"].pop("evaluate"), "incomplete or malformed"),
        (lambda r: r["trainable_sets"]["head"].pop("train_suffix"), "incomplete or malformed"),
        (lambda r: r["trainable_sets"]["head"].pop("needs"), "incomplete or malformed"),
        (lambda r: r["trainable_sets"]["head"].update(prefix="../x"), "without listing it"),
        (lambda r: r["trainable_sets"]["head"].update(hidden_size=0), "0 in the manifest is not a size"),
        (
            lambda r: r["trainable_sets"]["head"]["needs"]["train"].update(activations=[1, 2, 3]),
            "incomplete or malformed",
        ),
        (lambda r: r["trainable_sets"]["head"]["needs"]["train"].update(activations=[1, 2, 3, -4]), "-4"),
        (lambda r: r["trainable_sets"]["head"]["needs"]["train"].update(weights=1.5), r"1\.5"),
        (lambda r: r.pop("schema"), "not readable"),
        (lambda r: r.pop("files"), "incomplete or malformed"),
        (lambda r: r.pop("labels"), "incomplete or malformed"),
        (lambda r: r.pop("plans"), "incomplete or malformed"),
        (lambda r: r.pop("max_length"), "incomplete or malformed"),
        (lambda r: r.pop("trainable_sets"), "incomplete or malformed"),
        (lambda r: r["trainable_sets"]["head"].pop("initial"), "incomplete or malformed"),
        (lambda r: r.update(files=[]), "incomplete or malformed"),
        (lambda r: r.update(plans="tokenize.onnx"), "incomplete or malformed"),
        (lambda r: r.update(labels="yes"), "not a list of different texts"),
        (lambda r: r.update(labels=[]), "not a list of different texts"),
        (lambda r: r.update(labels=["a", "a"]), "not a list of different texts"),
        (lambda r: r.update(labels=["a", 1]), "not a list of different texts"),
        (lambda r: r["plans"].update(tokenize="missing.onnx"), "uses the file 'missing.onnx' without listing it"),
        (lambda r: r["trainable_sets"]["head"].update(train="../train.onnx"), "without listing it"),
        (lambda r: r["trainable_sets"]["head"].update(train=["train.onnx"]), "incomplete or malformed"),
        (lambda r: r["trainable_sets"]["head"].update(size=0), "0 in the manifest is not a size"),
        (lambda r: r["trainable_sets"]["head"].update(size=-5), "-5 in the manifest is not a size"),
        (lambda r: r["trainable_sets"]["head"].update(size=1 << 60), "is not a size"),
        (lambda r: r["trainable_sets"]["head"].update(size=True), "True in the manifest is not a size"),
        (lambda r: r.update(max_length=3.5), "3.5 in the manifest is not a size"),
        (lambda r: r["files"]["train.onnx"].update(bytes=1 << 62), "cannot have 1 chunks"),
        (lambda r: r["files"]["train.onnx"].update(bytes=10**40, chunks=[]), "cannot have 0 chunks"),
        (lambda r: r["files"]["train.onnx"].update(bytes=-1), "cannot have"),
        (lambda r: r["files"]["train.onnx"].update(bytes=20.0), "cannot have"),
        (lambda r: r["files"]["train.onnx"].update(bytes=True), "cannot have"),
        (lambda r: r["files"]["train.onnx"]["chunks"].append("0" * 64), "of 20 bytes cannot have 2 chunks"),
        (lambda r: r["files"]["train.onnx"].update(chunks=[]), "of 20 bytes cannot have 0 chunks"),
        (lambda r: r["files"]["train.onnx"].update(chunks=["../../x"]), "is not a SHA-256"),
        (lambda r: r["files"]["train.onnx"].update(sha256="A" * 64), "is not a SHA-256"),
        (lambda r: r["files"]["train.onnx"].update(sha256=7), "is not a SHA-256"),
        (lambda r: r["files"].update({"train.onnx": None}), "incomplete or malformed"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_in_one_sentence(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        parse_manifest(changed(change))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"null", b"5", b"[]", b"[1]", b'"x"', b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 10_000]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="not readable"):
        parse_manifest(data)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_manifest_with_one_part_replaced_raises_anything_but_an_artifact_error(data: st.DataObject) -> None:
    raw: Any = manifest(ONE)
    node, key = None, None
    inner = raw
    while isinstance(inner, (dict, list)) and inner:  # a random path down
        node, key = inner, data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner = inner[key]
        if data.draw(st.booleans()):
            break
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=5,
    )
    node[key] = data.draw(json_values)  # type: ignore[index]
    try:
        parsed = parse_manifest(json.dumps(raw).encode())
    except ArtifactError:
        return
    assert all(f.bytes >= 0 and len(f.chunks) == -(-f.bytes // CHUNK_BYTES) for f in parsed.files.values())


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_fault_14_one_flipped_bit_in_any_file_is_refused_and_the_file_is_named(
    nano_artifact: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(nano_artifact.folder, folder)
    version = nano_artifact.manifest.version
    assert open_artifact(folder, version).manifest == nano_artifact.manifest
    for name in [*nano_artifact.manifest.files, MANIFEST]:
        whole = (folder / name).read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            (folder / name).write_bytes(damaged)
            with pytest.raises(ArtifactError):
                open_artifact(folder, version)
        (folder / name).write_bytes(whole)
    target = folder / "backbone.bin"
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"backbone\.bin is missing or damaged; delete .* and fetch the artifact"):
        open_artifact(folder)
    target.unlink()
    with pytest.raises(ArtifactError, match=r"backbone\.bin is missing or damaged"):
        open_artifact(folder)


def test_a_folder_without_a_manifest_or_with_another_version_is_no_artifact(
    nano_artifact: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact in"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"holds version .*, not 000000000000; fetch it again"):
        open_artifact(nano_artifact.folder, "0" * 64)


# ---- fetching --------------------------------------------------------------------------------------------------------


def test_a_fetched_artifact_is_the_one_published_and_a_second_fetch_downloads_nothing(
    nano_built: BuiltArtifact, tmp_path: Path
) -> None:
    shelf = Shelf()
    shelf.manifests[nano_built.version] = (nano_built.folder / MANIFEST).read_bytes()
    shelf.blobs = {f["sha256"]: (nano_built.folder / n).read_bytes() for n, f in nano_built.manifest["files"].items()}
    told: list[float] = []
    artifact, received = fetch(shelf, nano_built.version, tmp_path, told.append)
    assert received >= artifact.manifest.bytes
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert contents(artifact.folder) == contents(nano_built.folder)
    assert PlanTrainer(artifact, "norms").initial_theta().size == artifact.manifest.sets["norms"].size
    shelf.chunks_left = 0
    again, received = fetch(shelf, nano_built.version, tmp_path)
    assert (again, received) == (artifact, 0)


def test_an_interrupted_fetch_goes_on_at_the_chunk_where_it_stopped(tmp_path: Path) -> None:
    shelf = Shelf(LARGE)
    (version,) = shelf.versions
    big = digest_of(BIG)
    before = 3  # the small files' chunks; manifests are written sorted, so backbone.bin comes first
    shelf.chunks_left = 2
    with pytest.raises(LinkError, match="the line went dead"):
        fetch(shelf, version, tmp_path)
    assert shelf.served == [(big, 0), (big, 1)]
    assert not (tmp_path / version).exists(), "half an artifact has no name that anyone would open"
    half = tmp_path / f"{version}.partial" / "backbone.bin"
    half.write_bytes(half.read_bytes() + b"half a chunk that was being written")
    shelf.served, shelf.chunks_left = [], 99
    artifact, received = fetch(shelf, version, tmp_path)
    assert [s for s in shelf.served if s[0] == big] == [(big, 2), (big, 3)]
    assert len(shelf.served) == 2 + before
    assert artifact.path("backbone.bin").read_bytes() == BIG
    assert received == len(shelf.manifests[version]) + CHUNK_BYTES + 123 + 60
    assert sorted(p.name for p in tmp_path.iterdir()) == [version], "nothing partial is left"


def test_a_chunk_damaged_on_disk_between_two_attempts_is_fetched_again(tmp_path: Path) -> None:
    shelf = Shelf(LARGE)
    (version,) = shelf.versions
    shelf.chunks_left = 3
    with pytest.raises(LinkError):
        fetch(shelf, version, tmp_path)
    half = tmp_path / f"{version}.partial" / "backbone.bin"
    data = bytearray(half.read_bytes())
    data[CHUNK_BYTES + 5] ^= 1
    half.write_bytes(data)
    shelf.served, shelf.chunks_left = [], 99
    artifact, _ = fetch(shelf, version, tmp_path)
    assert [i for d, i in shelf.served if d == digest_of(BIG)] == [1, 2, 3]
    assert artifact.path("backbone.bin").read_bytes() == BIG


@pytest.mark.parametrize(
    "change",
    [lambda p: p[:-1] + bytes([p[-1] ^ 1]), lambda p: p[:-1], lambda p: p + b"!", lambda p: b""],
    ids=["a bit", "too short", "too long", "empty"],
)
def test_fault_14_a_wrong_chunk_is_refused_and_never_written(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    shelf = Shelf(LARGE)
    (version,) = shelf.versions
    shelf.tampered, shelf.change = {(digest_of(BIG), 2)}, change
    with pytest.raises(ArtifactError, match=r"chunk 2 of backbone\.bin does not have the digest"):
        fetch(shelf, version, tmp_path)
    assert not (tmp_path / version).exists()
    assert (tmp_path / f"{version}.partial" / "backbone.bin").read_bytes() == BIG[: 2 * CHUNK_BYTES]
    shelf.tampered = set()
    assert fetch(shelf, version, tmp_path)[0].path("backbone.bin").read_bytes() == BIG


class Chatty(Shelf):
    """Sends one chunk too many, or stops one too early."""

    extra = 1

    def download(self, digest: str, first_chunk: int) -> Iterator[bytes]:
        pieces = list(super().download(digest, first_chunk))
        yield from [*pieces, b"more"] if self.extra > 0 else pieces[:-1]


def test_fault_14_a_source_that_sends_too_much_or_too_little_is_refused(tmp_path: Path) -> None:
    shelf = Chatty(LARGE)
    with pytest.raises(ArtifactError, match=r"chunk 4 of backbone\.bin"):
        fetch(shelf, shelf.versions[0], tmp_path / "a")
    shelf.extra = -1
    with pytest.raises(ArtifactError, match=r"backbone\.bin ended after 3 of 4 chunks; it will be continued"):
        fetch(shelf, shelf.versions[0], tmp_path / "b")
    assert not (tmp_path / "a" / shelf.versions[0]).exists()
    assert not (tmp_path / "b" / shelf.versions[0]).exists()


def test_a_file_that_another_version_has_is_not_downloaded_again(tmp_path: Path) -> None:
    newer = LARGE | {"theta.safetensors": b"H" * 30}
    shelf = Shelf(LARGE, newer)
    first, second = shelf.versions
    fetch(shelf, first, tmp_path)
    shelf.served = []
    artifact, received = fetch(shelf, second, tmp_path)
    assert shelf.served == [(digest_of(b"H" * 30), 0)]
    assert received == len(shelf.manifests[second]) + 30
    assert artifact.path("backbone.bin").read_bytes() == BIG
    open_artifact(tmp_path / first, first)  # the older one is still whole


def test_of_a_new_version_only_the_chunks_that_no_held_version_has_are_downloaded(tmp_path: Path) -> None:
    changed = BIG[:CHUNK_BYTES] + noise(CHUNK_BYTES, seed=2) + BIG[2 * CHUNK_BYTES :]
    renamed = {("weights.bin" if name == "tokenize.onnx" else name): data for name, data in ONE.items()}
    renamed |= {"tokenize.onnx": b"other"}
    shelf = Shelf(LARGE, renamed | {"backbone.bin": changed})
    _, first = fetch(shelf, shelf.versions[0], tmp_path)
    assert first == sum(map(len, LARGE.values())) + len(shelf.manifests[shelf.versions[0]])
    shelf.served.clear()
    found, second = fetch(shelf, shelf.versions[1], tmp_path)
    assert sorted(shelf.served) == sorted([(digest_of(changed), 1), (digest_of(b"other"), 0)])
    assert second == CHUNK_BYTES + len(b"other") + len(shelf.manifests[shelf.versions[1]])
    assert found.path("backbone.bin").read_bytes() == changed
    assert found.path("weights.bin").read_bytes() == ONE["tokenize.onnx"]  # another name, the same bytes


def test_a_held_chunk_that_is_damaged_or_gone_is_downloaded_instead(tmp_path: Path) -> None:
    changed = BIG[:CHUNK_BYTES] + noise(CHUNK_BYTES, seed=2) + BIG[2 * CHUNK_BYTES :]
    shelf = Shelf(LARGE, LARGE | {"backbone.bin": changed})
    held, _ = fetch(shelf, shelf.versions[0], tmp_path)
    data = bytearray(BIG)
    data[2 * CHUNK_BYTES] ^= 1
    held.path("backbone.bin").write_bytes(data[: 3 * CHUNK_BYTES])  # the third chunk damaged, the fourth gone
    shelf.served.clear()
    found, _ = fetch(shelf, shelf.versions[1], tmp_path)
    assert set(shelf.served) == {(digest_of(changed), i) for i in (1, 2, 3)}
    assert found.path("backbone.bin").read_bytes() == changed


def test_a_file_longer_than_it_should_be_is_cut_and_mended(tmp_path: Path) -> None:
    files = ONE | {"backbone.bin": BIG[:CHUNK_BYTES]}
    shelf = Shelf(files)
    partial = tmp_path / f"{shelf.versions[0]}.partial"
    partial.mkdir()
    (partial / "backbone.bin").write_bytes(BIG)
    assert fetch(shelf, shelf.versions[0], tmp_path)[0].path("backbone.bin").read_bytes() == BIG[:CHUNK_BYTES]


def test_an_artifact_damaged_on_disk_is_fetched_anew(tmp_path: Path) -> None:
    shelf = Shelf(ONE)
    artifact, _ = fetch(shelf, shelf.versions[0], tmp_path)
    artifact.path("train.onnx").write_bytes(b"b" * 20)
    assert fetch(shelf, shelf.versions[0], tmp_path)[0].path("train.onnx").read_bytes() == b"a" * 20


def test_a_manifest_of_another_version_than_asked_for_is_refused(tmp_path: Path) -> None:
    shelf = Shelf(ONE, LARGE)
    first, second = shelf.versions
    shelf.manifests[first] = shelf.manifests[second]
    with pytest.raises(ArtifactError, match=r"asked for version .*, was sent .*; refused"):
        fetch(shelf, first, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["../precious", "..", "", ".", "a/b", "A" * 64, "0" * 63])
def test_a_version_that_is_no_digest_touches_no_folder(version: str, tmp_path: Path) -> None:
    """It comes from the coordinator; taken as a path it could name, and delete, any folder of the app."""
    home, precious = tmp_path / "home", tmp_path / "precious"
    home.mkdir()
    precious.mkdir()
    (precious / "letters.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="is not a SHA-256"):
        fetch(Shelf(ONE), version, home)
    assert (precious / "letters.txt").read_text() == "dear"
    assert list(home.iterdir()) == []


# ---- building --------------------------------------------------------------------------------------------------------


def small_artifact(folder: Path, seed: int = 0, **changes: Any) -> BuiltArtifact:
    from pocketfed.model.config import MobileBertConfig
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(["yes please", "no thanks", "yes yes", "no no never"], 60)
    config = MobileBertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        intra_bottleneck_size=8,
        embedding_size=6,
        num_feedforward_networks=1,
        max_position_embeddings=16,
    )
    arguments: dict[str, Any] = {"labels": ["no", "yes"], "trainable_sets": ["head"], "quantized": True} | changes
    return build_artifact(folder, config=config, state={}, vocabulary=vocabulary, seed=seed, **arguments)


def test_the_same_inputs_give_the_same_version_and_another_seed_another(tmp_path: Path) -> None:
    first, again = small_artifact(tmp_path / "a"), small_artifact(tmp_path / "b")
    other = small_artifact(tmp_path / "c", seed=1)
    assert first.version == again.version != other.version
    assert contents(first.folder) == contents(again.folder)
    assert first.version == hashlib.sha256((first.folder / MANIFEST).read_bytes()).hexdigest()
    assert read_artifact(first.folder) == first
    assert open_artifact(first.folder, first.version).manifest.labels == ("no", "yes")


def test_nothing_in_an_artifact_is_a_pickle_or_says_where_it_was_built(nano_artifact: Artifact) -> None:
    for name in [*nano_artifact.manifest.files, MANIFEST]:
        data = nano_artifact.path(name).read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
        assert str(nano_artifact.folder.parent).encode() not in data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["only"]}, "at least two labels"),
        ({"labels": ["a", "b", "a"]}, "the label 'a' is there twice"),
        ({"labels": [str(i) for i in range(10_001)]}, "10001 labels are more than 10000"),
    ],
)
def test_doubtful_labels_stop_a_build_before_it_writes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=message):
        small_artifact(tmp_path / "a", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_nothing_and_one_never_overwrites(tmp_path: Path) -> None:
    from pocketfed.model.adapters import TrainableSetError

    with pytest.raises(TrainableSetError, match="asks for 9 blocks; the model has 1"):
        small_artifact(tmp_path / "a", trainable_sets=["head", "last:9"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(PublishError, match="is there already"):
        small_artifact(tmp_path / "a")


def test_the_coordinator_refuses_a_damaged_folder_too(tmp_path: Path) -> None:
    built = small_artifact(tmp_path / "a")
    path = built.folder / "backbone.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(PublishError, match=r"backbone\.bin is damaged"):
        read_artifact(built.folder)


def test_a_checkpoints_head_counts_for_its_own_labels_only_whatever_their_order(tmp_path: Path) -> None:
    import torch

    from pocketfed.model.config import STUDENTS
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(["play some jazz", "turn on the lamp"], 64)
    config = STUDENTS["nano"].with_changes(vocab_size=len(vocabulary))
    hidden = config.hidden_size
    weight = torch.arange(2.0)[:, None].expand(2, hidden).clone()  # row 0 is all 0, row 1 all 1
    head = {"classifier.weight": weight, "classifier.bias": torch.tensor([5.0, 7.0])}

    def bias_of(labels: list[str], head_labels: list[str]) -> list[float]:
        folder = tmp_path / "-".join([*labels, *head_labels])
        built = build_artifact(
            folder,
            config=config,
            state=head,
            vocabulary=vocabulary,
            labels=labels,
            trainable_sets=["head"],
            quantized=False,
            head_labels=head_labels,
        )
        sets = built.manifest["trainable_sets"]["head"]
        theta = decode_vector("theta", (folder / sets["initial"]).read_bytes(), sets["size"])
        place = next(p for p in sets["parameters"] if p["name"].endswith("classifier.bias"))
        return [float(v) for v in theta[place["offset"] : place["offset"] + 2]]

    assert bias_of(["no", "yes"], ["no", "yes"]) == [5.0, 7.0]
    assert bias_of(["yes", "no"], ["no", "yes"]) == [7.0, 5.0]
    assert bias_of(["up", "down"], ["no", "yes"]) == [0.0, 0.0]


def test_a_manifest_changed_by_hand_is_not_published(nano_built: BuiltArtifact, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(nano_built.folder, folder)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(PublishError, match="was changed after it was made"):
        read_artifact(folder)
