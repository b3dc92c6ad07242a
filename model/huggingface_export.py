"""A model folder for `transformers`: MobileBERT with the head it has, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pocketfed.model import checkpoints, huggingface
from pocketfed.model.checkpoints import CheckpointError
from pocketfed.model.config import ConfigError, MobileBertConfig
from pocketfed.model.heads import TASKS
from pocketfed.model.teacher import load_pretrained
from pocketfed.model.tokenization import Vocabulary, bert_rules


@dataclass(frozen=True)
class Exported:
    """architecture: the class that loads it. notes: a sentence each on what holds only under a condition there."""

    folder: Path
    architecture: str
    parameters: int
    notes: tuple[str, ...]


def export_huggingface(folder: Path, out: Path, task: str = "") -> Exported:
    """Write what `transformers` loads: `config.json`, `model.safetensors`, `vocab.txt` and the tokenizer's files.

    Args:
        folder: a student, a fine-tuned model, or one with its pre-training heads.
        task: what its classifier is for, one of `heads.TASKS`; by default spans if its labels are start and end, else
            classification.

    Raises:
        CheckpointError: no usable model, one that Hugging Face's classes cannot express, or no room for it.
    """
    if task and task not in TASKS:
        raise CheckpointError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    notes: list[str] = []
    labels: tuple[str, ...] = ()
    if has_pretraining_heads(folder):
        model, vocabulary = load_pretrained(folder)
        config, state = model.config, model.state_dict()
        head = "words" if config.pooling != "cls" else "words and pairs"
    else:
        checkpoint = checkpoints.load(folder)
        config, state, vocabulary = checkpoint.config, dict(checkpoint.state), checkpoints.tokens_of(checkpoint)
        head, labels = _head_of(checkpoint, task)
        if checkpoint.quantization:
            notes.append(f"{checkpoint.quantization} weights are written as the float32 they stand for")
    try:
        huggingface.check_expressible(config, head)
    except ConfigError as error:
        raise CheckpointError(f"{folder} is not exported: {error}") from None
    tensors = huggingface.write_tensors(config, state, head)
    content = huggingface.write_config(config, head, labels)
    checkpoints.write_whole(out, lambda fresh: _write(fresh, content, tensors, config, vocabulary))
    notes += huggingface.differences(config, head)
    return Exported(Path(out), huggingface.HEADS[head], sum(t.numel() for t in tensors.values()), tuple(notes))


def has_pretraining_heads(folder: Path) -> bool:
    """Whether a folder's model was kept with its heads of pre-training.

    Raises:
        CheckpointError: its weights are damaged.
    """
    path = Path(folder) / checkpoints.WEIGHTS
    if not path.is_file():
        return False  # which reading it will say
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.startswith(("cls.predictions.", "cls/predictions/")) for name in file.keys())  # noqa: SIM118 - not a mapping
    except Exception as error:  # safetensors has no common class for what a damaged header raises
        raise CheckpointError(f"{path} is damaged ({error}); fetch or save the model again") from None


def _head_of(checkpoint: checkpoints.Checkpoint, task: str) -> tuple[str, tuple[str, ...]]:
    if "classifier.weight" not in checkpoint.state:
        return "", ()
    rows = len(checkpoint.state["classifier.weight"])
    labels = checkpoint.labels or tuple(f"LABEL_{i}" for i in range(rows))
    return task or ("spans" if labels == huggingface.SPAN_LABELS else "classification"), labels


def _write(
    folder: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: MobileBertConfig,
    vocabulary: Vocabulary,
) -> None:
    held = {name: tensors[name].detach().float().contiguous().clone() for name in sorted(tensors)}
    save_file(held, folder / checkpoints.WEIGHTS, metadata={"format": "pt"})
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    of_tokenizer = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": vocabulary.lower_case,
        "model_max_length": config.max_position_embeddings,
        **special,
    }
    for name, values in (
        (checkpoints.CONFIG, content),
        (checkpoints.CASE, of_tokenizer),
        (checkpoints.SPECIAL, special),
    ):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / checkpoints.VOCABULARY).write_text("\n".join(vocabulary.tokens) + "\n", encoding="utf-8", newline="\n")
    (folder / checkpoints.TOKENIZER).write_text(_tokenizer_json(vocabulary), encoding="utf-8")


def _tokenizer_json(vocabulary: Vocabulary) -> str:
    """The `tokenizers` pipeline of that vocabulary; special tokens written in a text are special, as they are there."""
    from tokenizers import Tokenizer, decoders, models, processors

    pipeline = Tokenizer(models.WordPiece(vocabulary.ids, unk_token="[UNK]"))
    pipeline.normalizer, pipeline.pre_tokenizer = bert_rules(vocabulary.lower_case)
    pipeline.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary.cls_id), ("[SEP]", vocabulary.sep_id)],
    )
    pipeline.decoder = decoders.WordPiece()
    pipeline.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return str(pipeline.to_str(pretty=True))
