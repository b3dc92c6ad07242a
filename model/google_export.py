"""A model as the variables of Google's TF1 code, in an .npz file beside its configuration and vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketfed.model import checkpoints
from pocketfed.model.google_names import tensors_to_google
from pocketfed.model.huggingface import SPAN_LABELS
from pocketfed.model.huggingface_export import has_pretraining_heads
from pocketfed.model.teacher import load_pretrained


@dataclass(frozen=True)
class GoogleExport:
    """notes: a sentence each on what Google's code computes otherwise."""

    folder: Path
    variables: int
    parameters: int
    notes: tuple[str, ...]


def export_google(folder: Path, out: Path) -> GoogleExport:
    """Write `model.npz`, `config.json` and `vocab.txt`, which `checkpoints.load` reads too.

    Args:
        folder: a student, a fine-tuned model, or one with its pre-training heads.

    Raises:
        CheckpointError: no usable model, or no room for it.
    """
    labels: tuple[str, ...] | None = None
    if has_pretraining_heads(folder):
        model, vocabulary = load_pretrained(folder)
        config, state = model.config, model.state_dict()
    else:
        checkpoint = checkpoints.load(folder)
        config, state, vocabulary = checkpoint.config, dict(checkpoint.state), checkpoints.tokens_of(checkpoint)
        labels = checkpoint.labels
        if labels == SPAN_LABELS:  # Google's code has a variable of another name for them
            state |= {f"qa_outputs.{kind}": state.pop(f"classifier.{kind}") for kind in ("weight", "bias")}
    content = {"model_type": "mobilebert", **config.to_dict()}
    if labels is not None:
        content["labels"] = list(labels)
    notes = []
    if config.hidden_act == "gelu":
        notes.append("its gelu is the exact one, there it is the tanh form")
    if config.mask_style == "hard" or config.isolate_padding:
        notes.append("padding is masked softly there, so padded texts come out a little otherwise")
    if config.pooling != "cls" or config.head_norm:
        notes.append("heads there read [CLS] without a norm; this model's read what pooling and head_norm say")
    content["hidden_act"] = "gelu" if config.hidden_act == "gelu_tanh" else config.hidden_act
    variables = {name: value.detach().float().numpy() for name, value in tensors_to_google(state, config).items()}

    def write(fresh: Path) -> None:
        with (fresh / checkpoints.ARRAYS).open("wb") as stream:
            np.savez(stream, **variables)  # type: ignore[arg-type]  # names with a slash, none of them an option's
        (fresh / checkpoints.CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (fresh / checkpoints.CASE).write_text(json.dumps({"do_lower_case": vocabulary.lower_case}) + "\n")
        vocabulary.save(fresh / checkpoints.VOCABULARY)

    checkpoints.write_whole(out, write)
    return GoogleExport(Path(out), len(variables), sum(v.size for v in variables.values()), tuple(notes))
