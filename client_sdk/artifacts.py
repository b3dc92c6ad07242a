"""Artifacts on the device: what a manifest says, fetching what is missing, and never loading a byte that was not checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pocketfed.client_sdk.errors import ArtifactError, UnsupportedError
from pocketfed.client_sdk.version import SDK_VERSION, at_least
from pocketfed.model.parameters import Parameter, lay_out, total_size

SCHEMA = 2
TASKS = ("classification", "regression", "tokens", "spans")
CHUNK_BYTES = 1 << 20
MAX_ARTIFACT_BYTES = 2 << 30  # a manifest that asks for more is not one for a device
MANIFEST = "manifest.json"
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class File:
    """sha256: of the whole; chunks: of each CHUNK_BYTES piece."""

    sha256: str
    bytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Needs:
    """Memory of a plan while it runs, in bytes.

    weights: of what is frozen, were it all widened to float32. activations: c0 + c1 B + c2 B T + c3 B T^2.
    """

    weights: int
    activations: tuple[int, int, int, int]

    def bytes(self, batch: int, tokens: int) -> int:
        """Of the activations.

        >>> Needs(0, (1000, 10, 2, 1)).bytes(3, 4)
        1102
        """
        c0, c1, c2, c3 = self.activations
        return c0 + batch * (c1 + tokens * (c2 + tokens * c3))


@dataclass(frozen=True)
class TrainableSet:
    """Files of one trainable set's plans, and how many parameters it has; `layout` says what they are called.

    The suffix plans, and the prefix below them, are there where whole blocks lie below the lowest trainable parameter.
    hidden_size: of the prefix's result, a row a token or, without `keeps_tokens`, an example.
    """

    train: str
    evaluate: str
    predict: str
    initial: str
    size: int
    prefix: str = ""
    train_suffix: str = ""
    evaluate_suffix: str = ""
    predict_suffix: str = ""
    hidden_size: int = 0
    keeps_tokens: bool = True
    needs: Mapping[str, Needs] = field(default_factory=dict)
    layout: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What docs/artifact.md describes, checked."""

    version: str
    task: str
    labels: tuple[str, ...]
    max_length: int
    tokenize: str
    sets: Mapping[str, TrainableSet]
    files: Mapping[str, File]

    def set_named(self, name: str) -> TrainableSet:
        """
        Raises:
            ArtifactError: the artifact does not carry that set.
        """
        if name not in self.sets:
            raise ArtifactError(
                f"the artifact {self.version[:12]} has no trainable set {name!r}, only {', '.join(self.sets)}"
            )
        return self.sets[name]

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files.values())


def parse_manifest(data: bytes) -> Manifest:
    """
    Raises:
        ArtifactError: not a manifest, of a newer schema, or with names, digests or sizes that cannot be.
    """
    try:
        raw = json.loads(data)
        schema = raw["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"the manifest is not readable ({error}); fetch the artifact again") from None
    if not at_least(str(raw.get("min_sdk", SDK_VERSION))[:50]):  # first: the rest may be in words that we do not know
        needed = str(raw["min_sdk"])[:50]
        raise UnsupportedError(f"the artifact needs SDK {needed!r}, this is {SDK_VERSION}: update the app")
    if schema != SCHEMA:
        raise UnsupportedError(f"the manifest has schema {repr(schema)[:50]}; this SDK reads {SCHEMA}: update the app")
    try:
        files = {_safe_name(n): _file(n, f) for n, f in raw["files"].items()}
        sets = {str(n): _set(s, files) for n, s in raw["trainable_sets"].items()}
        task = _task(raw["task"])
        labels = _labels(raw["labels"])
        tokenize = _known(raw["plans"]["tokenize"], files)
        max_length = _count(raw["max_length"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"the manifest is incomplete or malformed: {error!r}; publish the artifact again") from None
    total = sum(f.bytes for f in files.values())
    if total > MAX_ARTIFACT_BYTES:
        raise ArtifactError(f"the manifest lists {total} bytes; at most {MAX_ARTIFACT_BYTES} are fetched")
    return Manifest(hashlib.sha256(data).hexdigest(), task, labels, max_length, tokenize, sets, files)


def _set(raw: Mapping[str, Any], files: Mapping[str, File]) -> TrainableSet:
    names: dict[str, Any] = {n: _known(raw[n], files) for n in ("train", "evaluate", "predict", "initial")}
    upper: dict[str, Any] = {}
    if "prefix" in raw:
        upper = {n: _known(raw[n], files) for n in ("prefix", "train_suffix", "evaluate_suffix", "predict_suffix")}
        upper |= {"hidden_size": _count(raw["hidden_size"]), "keeps_tokens": bool(raw["keeps_tokens"])}
    needs = {str(n): _needs(v) for n, v in raw["needs"].items()}
    size, layout = _count(raw["size"]), _layout(raw["parameters"])
    if total_size(layout) != size:
        raise ArtifactError(f"the manifest has {size} parameters in a set that names {total_size(layout)}")
    return TrainableSet(**names, **upper, size=size, needs=needs, layout=layout)


def _layout(raw: Sequence[Mapping[str, Any]]) -> tuple[Parameter, ...]:
    layout = tuple(Parameter(str(p["name"]), tuple(map(_count, p["shape"])), _whole(p["offset"])) for p in raw)
    if layout != lay_out((p.name, p.shape) for p in layout):
        raise ArtifactError("the manifest's parameters do not lie one after another; publish the artifact again")
    return layout


def _needs(raw: Mapping[str, Any]) -> Needs:
    c0, c1, c2, c3 = (_whole(c) for c in raw["activations"])
    return Needs(_whole(raw["weights"]), (c0, c1, c2, c3))


def _task(name: Any) -> str:
    if name not in TASKS:
        raise UnsupportedError(
            f"the manifest's task is {str(name)[:100]!r}; this SDK knows {', '.join(TASKS)}: update the app"
        )
    return str(name)


def _safe_name(name: str) -> str:
    if (
        not name
        or len(name) > 100
        or name.startswith(".")
        or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    ):
        raise ArtifactError(f"the manifest names a file {name[:100]!r}; only plain names without folders are accepted")
    return name


def checked_digest(text: Any) -> str:
    if not isinstance(text, str) or len(text) != 64 or not set(text) <= _HEX:
        raise ArtifactError(f"{str(text)[:80]!r} is not a SHA-256; a version and each digest of a manifest must be one")
    return text


def _count(number: Any) -> int:
    if _whole(number) == 0:
        raise ArtifactError("0 in the manifest is not a size")
    return int(number)


def _whole(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 40:
        raise ArtifactError(f"{number!r} in the manifest is not a size")
    return number


def _labels(raw: Any) -> tuple[str, ...]:
    texts = isinstance(raw, list) and all(isinstance(label, str) for label in raw)
    if not texts or not raw or len(set(raw)) < len(raw):
        raise ArtifactError("the labels in the manifest are not a list of different texts; publish the artifact again")
    return tuple(raw)


def _known(name: Any, files: Mapping[str, File]) -> str:
    if name not in files:
        raise ArtifactError(f"the manifest uses the file {str(name)[:100]!r} without listing it")
    return str(name)


def _file(name: str, raw: Mapping[str, Any]) -> File:
    size = raw["bytes"]
    chunks = tuple(checked_digest(c) for c in raw["chunks"])
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or len(chunks) != -(-size // CHUNK_BYTES):
        raise ArtifactError(f"{name} of {size!r} bytes cannot have {len(chunks)} chunks of {CHUNK_BYTES} bytes")
    return File(checked_digest(raw["sha256"]), size, chunks)


@dataclass(frozen=True)
class Artifact:
    """A complete, checked artifact in a folder."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        return self.folder / name


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_artifact(folder: Path, version: str | None = None) -> Artifact:
    """Check every byte of an artifact's folder against its manifest.

    Args:
        version: what it must be, where that is known.

    Raises:
        ArtifactError: a file is missing or differs in a single bit, or it is another version.
    """
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise ArtifactError(f"there is no artifact in {folder}: {error.strerror}; publish or fetch it again") from None
    if version is not None and manifest.version != version:
        raise ArtifactError(f"{folder} holds version {manifest.version[:12]}, not {version[:12]}; fetch it again")
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.bytes or file_digest(path) != file.sha256:
            raise ArtifactError(f"{path} is missing or damaged; delete {folder} and fetch the artifact again")
    return Artifact(folder, manifest)


class Source(Protocol):
    """Where artifacts come from."""

    def manifest(self, version: str) -> bytes:
        """The manifest's bytes."""

    def download(self, digest: str, first_chunk: int) -> Iterator[bytes]:
        """The chunks of the bytes with that digest, from `first_chunk` on."""


def fetch(
    source: Source,
    version: str,
    home: Path,
    progress: Callable[[float], None] = lambda fraction: None,
    room: Callable[[int], None] = lambda count: None,
    tasks: Sequence[str] = TASKS,
) -> tuple[Artifact, int]:
    """The artifact of that version under `home`, downloading only what is not there. Returns it and the bytes downloaded.

    An interrupted fetch goes on where it stopped; a file of the same content in another version is not downloaded again.

    Args:
        room: told how many bytes are to come before the first of them does; raises where there is no room.
        tasks: those that are of use here.

    Raises:
        ArtifactError: what arrives is not what the manifest promises, or nothing that this SDK can run.
        LinkError: from the source.
    """
    target = home / checked_digest(version)  # it comes from the network, and names a folder
    if target.is_dir():
        try:
            return open_artifact(target, version), 0
        except ArtifactError:
            shutil.rmtree(target)  # damaged on disk: fetched anew
    data = source.manifest(version)
    manifest = parse_manifest(data)
    if manifest.version != version:
        raise ArtifactError(f"asked for version {version[:12]}, was sent {manifest.version[:12]}; refused")
    if manifest.task not in tasks:
        raise UnsupportedError(
            f"the artifact {version[:12]} is for {manifest.task}; this app's SDK does {', '.join(tasks)}: update the app"
        )
    partial = home / f"{version}.partial"
    room(manifest.bytes - sum(f.stat().st_size for f in partial.glob("*")))
    partial.mkdir(parents=True, exist_ok=True)
    received = len(data)
    done, total = 0, max(1, manifest.bytes)
    for name, file in manifest.files.items():
        if not _reuse(home, partial / name, file):
            for size in _download(source, file, partial / name):
                received += size
                progress((done + (partial / name).stat().st_size) / total)
        done += file.bytes
    (partial / MANIFEST).write_bytes(data)
    open_artifact(partial, version)
    os.replace(partial, target)
    progress(1.0)
    return Artifact(target, manifest), received


def _reuse(home: Path, path: Path, file: File) -> bool:
    """Link a file of the same content from this or another version."""
    if path.is_file() and path.stat().st_size == file.bytes and file_digest(path) == file.sha256:
        return True
    for candidate in home.glob(f"*/{path.name}"):
        same_size = candidate != path and candidate.is_file() and candidate.stat().st_size == file.bytes
        if same_size and file_digest(candidate) == file.sha256:
            path.unlink(missing_ok=True)
            shutil.copyfile(candidate, path)
            return True
    return False


def _download(source: Source, file: File, path: Path) -> Iterator[int]:
    """Append the missing chunks, each checked before it is written. Yields their sizes."""
    whole = min(path.stat().st_size // CHUNK_BYTES, len(file.chunks)) if path.exists() else 0
    if path.exists() and path.stat().st_size == file.bytes:
        whole = 0  # as long as it should be, yet with another digest: begin anew
    with path.open("r+b" if path.exists() else "wb") as stream:
        whole = min(whole, _intact_chunks(stream, file, whole))
        stream.seek(whole * CHUNK_BYTES)
        stream.truncate()
        index = whole
        if index < len(file.chunks):
            for data in source.download(file.sha256, index):
                if index >= len(file.chunks) or hashlib.sha256(data).hexdigest() != file.chunks[index]:
                    raise ArtifactError(
                        f"chunk {index} of {path.name} does not have the digest that the manifest promises; it was not kept"
                    )
                stream.write(data)
                stream.flush()
                index += 1
                yield len(data)
        if index != len(file.chunks):
            raise ArtifactError(f"{path.name} ended after {index} of {len(file.chunks)} chunks; it will be continued")


def _intact_chunks(stream: Any, file: File, count: int) -> int:
    """How many of the first `count` chunks on disk have the digests they should."""
    stream.seek(0)
    for index in range(count):
        if hashlib.sha256(stream.read(CHUNK_BYTES)).hexdigest() != file.chunks[index]:
            return index
    return count
