"""Model folders: `config.json`, `model.safetensors`, `vocab.txt`; Hugging Face's and TF1's names are read too."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pocketfed.model.bert import bert_config, bert_tensors
from pocketfed.model.config import ConfigError, MobileBertConfig
from pocketfed.model.google_names import config_of_google, is_google, tensors_from_google
from pocketfed.model.huggingface import read_config, read_labels, read_tensors
from pocketfed.model.mobilebert import MobileBert
from pocketfed.model.packing import read_tensors as read_file
from pocketfed.model.packing import write_packed
from pocketfed.model.quantization import (
    GROUP,
    QuantizationError,
    Storage,
    dequantize_state,
    quantize_state,
    stored_bytes,
)
from pocketfed.model.schemes import SCHEMES, Range, read_ranges, scheme_of, write_ranges
from pocketfed.model.shipped import located
from pocketfed.model.tokenization import Vocabulary, VocabularyError, load_vocabulary

CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "vocab.txt"
ARRAYS = "model.npz"  # read, never written: arrays taken from a TF1 checkpoint
CASE, CARD = "tokenizer_config.json", "README.md"
POOLING = "1_Pooling/config.json"  # of sentence encoders, read only
TOKENIZER, SPECIAL = "tokenizer.json", "special_tokens_map.json"  # for Hugging Face
RANGES, QUANTIZED = "ranges.json", "quantization.json"  # of activations; what quantizing cost
OWN_FILES = {CONFIG, WEIGHTS, VOCABULARY, CASE, CARD, TOKENIZER, SPECIAL, RANGES, QUANTIZED}


class CheckpointError(ValueError):
    """A folder that no model can be read from, or written to."""


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest.

    state: float32 tensors, named as in `MobileBert`, and `classifier.weight`, `classifier.bias` where there is a head.
    labels: what the classifier's rows mean. quantization: the scheme, one of SCHEMES, if it is, or is to be, stored so;
    group, keep: as in `Storage`; ranges: of activations, for the schemes that fix them.
    """

    config: MobileBertConfig
    state: Mapping[str, Tensor]
    vocabulary: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    quantization: str | None = None
    lower_case: bool = True
    group: int = GROUP
    keep: tuple[str, ...] = ()
    ranges: Mapping[str, Range] | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and self.quantization not in SCHEMES:
            raise CheckpointError(f"quantization is {self.quantization!r}; choose one of {', '.join(SCHEMES)}, or none")
        _check_vocabulary(self.config, len(self.vocabulary))
        _check_tensors(self.config, self.state, self.labels)

    @property
    def storage(self) -> Storage | None:
        """How its tensors lie in the file; none for float32."""
        return Storage(scheme_of(self.quantization).bits, self.group, self.keep) if self.quantization else None

    @property
    def kept_float(self) -> tuple[str, ...]:
        """Layers that stay float32 wherever the others are int8; in four bits what is kept is int8."""
        return self.keep if self.storage is not None and self.storage.bits == 8 else ()


# ---- writing -------------------------------------------------------------------------------------------------------


def save(checkpoint: Checkpoint, folder: Path, card: str | None = None, report: str | None = None) -> None:
    """Write a model folder, whole or not at all; a model folder already there is replaced.

    Args:
        card: text of the folder's README.md.
        report: text of its quantization.json.

    Raises:
        CheckpointError: the place is taken by something else, cannot be written to, or the weights are not finite.
    """

    def write(fresh: Path) -> None:
        _write(checkpoint, fresh, card)
        if report is not None:
            (fresh / QUANTIZED).write_text(report, encoding="utf-8")

    write_whole(folder, write)


def save_folder(folder: Path, config: MobileBertConfig, tensors: Mapping[str, Tensor], vocabulary: Vocabulary) -> None:
    """Any tensors of a model, such as its pre-training heads, as a folder like Hugging Face's; whole or not at all.

    Raises:
        CheckpointError: the place is taken by something else, or cannot be written to.
    """

    def write(fresh: Path) -> None:
        held = {name: tensors[name].detach().float().cpu().contiguous().clone() for name in sorted(tensors)}
        save_file(held, fresh / WEIGHTS, metadata={"format": "pt"})
        _write_texts(fresh, {"model_type": "mobilebert", **config.to_dict()}, vocabulary.tokens, vocabulary.lower_case)

    write_whole(folder, write)


def load_folder(folder: Path) -> tuple[MobileBertConfig, dict[str, Tensor], Vocabulary]:
    """What `save_folder` wrote, with Hugging Face's names as they are; or a plain BERT, in the same names.

    Raises:
        CheckpointError: no model folder, or a damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}; check the path")
    content, tensors = _read_model(folder, kinds=("mobilebert", "bert"))
    try:
        if content.get("model_type") == "bert":
            config, tensors = bert_config(content, _pooling(folder)), bert_tensors(tensors)
        else:
            config = read_config(content, tensors)
        vocabulary = load_vocabulary(folder)
        _check_vocabulary(config, len(vocabulary))
        return config, tensors, vocabulary
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no vocabulary; put its vocab.txt or tokenizer.json there") from None
    except (CheckpointError, ConfigError, VocabularyError) as error:
        raise CheckpointError(f"{folder} is not a usable model: {error}") from None


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A model folder that `write` fills, whole or not at all; one that is there already is replaced.

    Raises:
        CheckpointError: the place is taken by something else, or cannot be written to.
    """
    folder = Path(folder)
    check_writable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}; choose another folder") from None
    try:
        fresh = work / "new"
        fresh.mkdir()
        write(fresh)
        if folder.exists():
            os.replace(folder, work / "old")  # a folder that is not empty cannot be replaced in one move
        os.replace(fresh, folder)
    except (OSError, SafetensorError) as error:
        if (work / "old").exists() and not folder.exists():
            os.replace(work / "old", folder)
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder} cannot be written: {why}; choose another folder, or free some space") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises CheckpointError if something that is not a model folder of ours is in the way.

    Worth calling before hours of training, not only after.
    """
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is not a folder; name a folder for the model, new or empty")
    held = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if held and not ({CONFIG, WEIGHTS} <= held and held <= OWN_FILES):
        foreign = min(held - OWN_FILES, default=min(held))
        raise CheckpointError(f"{folder} holds {foreign} and is not a model folder; name a new or an empty folder")


def _write(checkpoint: Checkpoint, folder: Path, card: str | None) -> None:
    content = {"model_type": "mobilebert", **checkpoint.config.to_dict()}
    storage = checkpoint.storage
    if storage is not None:
        content["quantization"] = checkpoint.quantization
        content |= {"quantization_group": storage.group} if storage.bits == 4 else {}
        content |= {"quantization_keep": list(storage.keep)} if storage.keep else {}
    if checkpoint.labels is not None:
        content["labels"] = list(checkpoint.labels)
    try:
        # Quantized or not, the check that every value is finite is the same.
        stored, _ = quantize_state(checkpoint.state, storage or Storage())
    except QuantizationError as error:
        raise CheckpointError(f"the model is not saved: {error}") from None
    if storage is not None:
        write_packed(stored, folder / WEIGHTS)
    else:
        ordered = {
            name: checkpoint.state[name].detach().float().contiguous().clone() for name in sorted(checkpoint.state)
        }
        save_file(ordered, folder / WEIGHTS, metadata={"format": "pt"})
    if checkpoint.ranges is not None:
        (folder / RANGES).write_text(write_ranges(checkpoint.ranges), encoding="utf-8")
    _write_texts(folder, content, checkpoint.vocabulary, checkpoint.lower_case)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")


def _write_texts(folder: Path, content: Mapping[str, Any], vocabulary: Sequence[str], lower_case: bool) -> None:
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CASE).write_text(json.dumps({"do_lower_case": lower_case}) + "\n", encoding="utf-8")
    (folder / VOCABULARY).write_text("\n".join(vocabulary) + "\n", encoding="utf-8", newline="\n")


# ---- reading -------------------------------------------------------------------------------------------------------


def load(folder: Path) -> Checkpoint:
    """Read a model folder of ours or Hugging Face's; int8 and int4 come back as float32, pre-training heads are dropped.

    Raises:
        CheckpointError: anything missing, damaged or not fitting; one sentence that names it.
    """
    folder = located(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}; check the path, or run `pocketfed distill`")
    content, tensors = _read_model(folder)
    try:
        config = read_config(content, tensors)
        vocabulary = load_vocabulary(folder)
        scheme, group, keep = _read_storage(content, tensors)
        state, labels = read_tensors(config, dequantize_state(tensors, group)), read_labels(content, tensors)
        ranges = read_ranges((folder / RANGES).read_bytes()) if (folder / RANGES).is_file() else None
        return Checkpoint(config, state, vocabulary.tokens, labels, scheme, vocabulary.lower_case, group, keep, ranges)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no vocabulary; put its vocab.txt or tokenizer.json there") from None
    except (CheckpointError, ConfigError, QuantizationError, VocabularyError) as error:
        raise CheckpointError(f"{folder} is not a usable model: {error}") from None


def _read_storage(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str | None, int, tuple[str, ...]]:
    """Scheme, group and what is kept. Folders of old have int8 weights and do not say so."""
    integers = any(value.dtype in (torch.int8, torch.uint8) for value in tensors.values())
    scheme, group = content.get("quantization", "int8"), content.get("quantization_group", GROUP)
    keep = content.get("quantization_keep", [])
    if not isinstance(scheme, str) or not isinstance(group, int) or not isinstance(keep, list):
        raise CheckpointError(f"its quantization is {scheme!r} with group {group!r}; quantize the model again")
    return (scheme, Storage(group=group).group, tuple(map(str, keep))) if integers else (None, GROUP, ())


def load_student(checkpoint: Checkpoint) -> MobileBert:
    """The encoder, ready to run, in evaluation mode; its tensors are copies."""
    with torch.device("meta"):  # the initial weights would be thrown away
        model = MobileBert(checkpoint.config)
    state = {name: value.clone() for name, value in checkpoint.state.items() if not name.startswith("classifier.")}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def tokens_of(checkpoint: Checkpoint) -> Vocabulary:
    """The checkpoint's vocabulary, as tokenizers want it."""
    return Vocabulary(checkpoint.vocabulary, checkpoint.lower_case)


def expected_shapes(config: MobileBertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a student, without building it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in MobileBert(config).state_dict().items()}


def stored_sizes(config: MobileBertConfig) -> dict[str, int]:
    """Bytes of the student's weights in float32, float16, int8 and int4; the last two before they are packed."""
    shapes = expected_shapes(config)
    count = sum(math.prod(shape) for shape in shapes.values())
    return {
        "fp32": 4 * count,
        "fp16": 2 * count,
        "int8": stored_bytes(shapes),
        "int4": stored_bytes(shapes, Storage(bits=4)),
    }


def _read_config(folder: Path, kinds: Sequence[str]) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{folder} has no readable {CONFIG}: not a model folder; check the path") from None
    except ValueError:
        raise CheckpointError(f"{path} is not JSON; fetch or save the model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no object; fetch or save the model again")
    kind = content.get("model_type", "mobilebert")
    if kind not in kinds:
        teaches = "; a bert can only be a teacher, of `pocketfed distill --teacher`" if kind == "bert" else ""
        raise CheckpointError(f"{path} describes a {kind!r}; only {' or '.join(kinds)} can be read here{teaches}")
    return content


def _pooling(folder: Path) -> str:
    """How a sentence encoder's folder says that its vectors are made; the mean unless it is the first token's."""
    try:
        stated = json.loads((folder / POOLING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "mean"
    return "cls" if isinstance(stated, dict) and stated.get("pooling_mode_cls_token") else "mean"


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path, arrays = folder / WEIGHTS, folder / ARRAYS
    if not path.is_file() and not arrays.is_file():
        pickled = next(iter(sorted(p.name for p in folder.glob("*.bin"))), None)
        if pickled:
            raise CheckpointError(
                f"{folder} holds {pickled}, a pickle, which can run any code when it is read; convert it to {WEIGHTS}"
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}; fetch or save the model again")
    try:
        if path.is_file():
            return read_file(path)
        with np.load(arrays, allow_pickle=False) as held:
            return {name: torch.from_numpy(np.ascontiguousarray(held[name])) for name in held.files}
    except (SafetensorError, zipfile.BadZipFile, OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{path if path.is_file() else arrays} is damaged ({error}); fetch or save the model again"
        ) from None


def _read_model(folder: Path, kinds: Sequence[str] = ("mobilebert",)) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors in Hugging Face's names, whichever of both's they are stored in."""
    content, tensors = _read_config(folder, kinds), _read_tensors(folder)
    if not is_google(tensors):
        return content, tensors
    try:
        return config_of_google(content), tensors_from_google(tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder} is not a usable model: {error}") from None


def _check_vocabulary(config: MobileBertConfig, tokens: int) -> None:
    if tokens != config.vocab_size:
        raise CheckpointError(
            f"the vocabulary has {tokens} tokens and the config's vocab_size is {config.vocab_size}; use the vocabulary the "
            "model was trained with"
        )


def _check_tensors(config: MobileBertConfig, state: Mapping[str, Tensor], labels: tuple[str, ...] | None) -> None:
    expected = expected_shapes(config)
    if "classifier.weight" in state:
        rows = state["classifier.weight"].shape[0] if labels is None else len(labels)
        expected |= {"classifier.weight": (rows, config.hidden_size), "classifier.bias": (rows,)}
    missing = next((name for name in expected if name not in state), None)
    if missing:
        raise CheckpointError(f"the tensor {missing}, which the config asks for, is missing; fetch both again")
    extra = next((name for name in state if name not in expected), None)
    if extra:
        raise CheckpointError(f"the tensor {extra} has no place in the model of the config; fetch both again")
    for name, shape in expected.items():
        value = state[name]
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"the tensor {name} has shape {tuple(value.shape)} and the config asks for {shape}; fetch both again"
            )
        if value.dtype != torch.float32:
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"the tensor {name} holds {kind}; save it as float32")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"the tensor {name} holds a value that is NaN or infinite; train the model again")
