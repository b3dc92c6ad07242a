"""What rounding costs a task: one classifier, measured as it is and as every scheme would compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pocketfed.model.adapters import select
from pocketfed.model.calibration import calibrate, some_rows
from pocketfed.model.checkpoints import Checkpoint, tokens_of
from pocketfed.model.encoded import Encoded, Kind
from pocketfed.model.fake_quant import RoundedNorm, as_scheme, round_rows, sites
from pocketfed.model.finetuning import Recipe, fine_tune, make_model, predict
from pocketfed.model.heads import TextClassifier
from pocketfed.model.metrics import goodness
from pocketfed.model.quantization import Storage, dequantize_state, quantize_state
from pocketfed.model.schemes import SCHEMES, Range, Scheme
from pocketfed.model.supervision import kind_of
from pocketfed.model.tasks import DataError, Dataset
from pocketfed.model.tokenization import Tokenizer

COMPARED = 64  # texts on which what layers give is compared


@dataclass(frozen=True)
class Trial:
    """A task to judge by: its dev (else test) split, and the one that a head or a whole model is trained on."""

    kind: Kind
    metric: str
    name: str
    split: str
    train: Encoded
    dev: Encoded

    def score(self, model: nn.Module) -> float:
        """The measure in percent, the more the better."""
        return 100.0 * goodness(self.kind.score(predict(model, self.dev), self.dev), self.metric)


def trial_of(checkpoint: Checkpoint, dataset: Dataset, max_length: int) -> Trial:
    """The data as this model reads it; a model with a classifier must have been trained for these labels.

    Raises:
        DataError: a label that the model's classifier does not have, or nothing to measure on.
    """
    if checkpoint.labels is not None and dataset.kind in ("classification", "tokens"):
        unknown = next((label for label in dataset.labels if label not in checkpoint.labels), None)
        if unknown is not None:
            raise DataError(
                f"the model tells apart {', '.join(checkpoint.labels[:5])} and {dataset.name} has the label {unknown!r}; "
                "give data of the task it was fine-tuned for"
            )
        dataset = replace(dataset, labels=checkpoint.labels)
    split = "dev" if dataset.dev else "test"
    dataset = dataset if dataset.dev else dataset.with_test()
    kind, tokenizer = kind_of(dataset), Tokenizer(tokens_of(checkpoint))
    if checkpoint.labels is not None and kind.outputs != len(checkpoint.labels):
        raise DataError(
            f"the model's head has {len(checkpoint.labels)} outputs and {dataset.name} ({dataset.kind}) asks for "
            f"{kind.outputs}; give data of the task it was fine-tuned for"
        )
    measured = dataset.dev or dataset.test
    return Trial(
        kind,
        dataset.metric,
        dataset.name,
        split,
        kind.encode(dataset.train, tokenizer, max_length),
        kind.encode(measured, tokenizer, max_length),
    )


def classifier_of(
    checkpoint: Checkpoint,
    trial: Trial,
    recipe: Recipe,
    seed: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> TextClassifier:
    """The model's own classifier; for a task-agnostic one a head trained on the task, all else as it is."""
    model = make_model(checkpoint.config, checkpoint.state, tokens_of(checkpoint).sep_id, trial.kind, seed)
    if checkpoint.labels is not None:
        head = {name.removeprefix("classifier."): value for name, value in checkpoint.state.items() if is_head(name)}
        model.classifier.load_state_dict(head)
        return model.eval()
    fine_tune(select(model, "head", seed), trial.kind, trial.train, recipe, seed, progress=progress)
    return model.eval().requires_grad_(False)


def is_head(name: str) -> bool:
    return name.startswith("classifier.")


def state_of(model: TextClassifier) -> dict[str, Tensor]:
    """Its tensors by the names of a `Checkpoint`; ranges of activations are left out."""
    named = {name.removeprefix("mobilebert."): value.detach() for name, value in model.named_parameters()}
    return {name: value.clone() for name, value in named.items()}


def with_state(model: TextClassifier, state: Mapping[str, Tensor]) -> TextClassifier:
    """The model with other values, in place."""
    named = {name if is_head(name) else f"mobilebert.{name}": value for name, value in state.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(named[name])
    return model


def rounded(model: TextClassifier, storage: Storage) -> TextClassifier:
    """A copy whose tensors are what is read back once they were stored so; computed with in float32."""
    copied = as_scheme(model, SCHEMES["int8"])  # which computes as it is
    tensors, _ = quantize_state(state_of(model), storage)
    return with_state(copied, dequantize_state(tensors, storage.group))


def quantized(
    model: TextClassifier, scheme: Scheme, storage: Storage, texts: Encoded | None
) -> tuple[TextClassifier, dict[str, Range] | None]:
    """A copy that computes as the scheme does, and the ranges it took from `texts` where the scheme fixes them."""
    made = as_scheme(rounded(model, storage), scheme, storage.keep)
    if scheme.activations != "static":
        return made, None
    assert texts is not None  # asked for beforehand
    return made, calibrate(made, texts)


# ---- training with the rounding in place ---------------------------------------------------------------------------


def rounding_aware(checkpoint: Checkpoint, keep: tuple[str, ...]) -> Checkpoint:
    """The student as Google's quantization-aware recipe changes it: a soft mask, and ReLU6 in place of ReLU."""
    config = checkpoint.config
    act = "relu6" if config.hidden_act == "relu" else config.hidden_act
    return replace(checkpoint, config=config.with_changes(mask_style="soft", hidden_act=act), keep=keep)


def train_aware(
    checkpoint: Checkpoint,
    model: TextClassifier,
    trial: Trial,
    texts: Encoded,
    recipe: Recipe,
    seed: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[TextClassifier, TextClassifier, dict[str, Range]]:
    """Goes on from `model` on the task with weights, products and NoNorm rounded (Jacob et al. 2018).

    Args:
        checkpoint: from `rounding_aware`.
    Returns:
        The model in float32, its NoNorms on their grid; one that computes as stored; and its ranges.
    """
    plain = make_model(checkpoint.config, {}, tokens_of(checkpoint).sep_id, trial.kind, seed)
    with_state(plain, state_of(model))
    scheme = SCHEMES["int8-qat"]
    aware = as_scheme(plain, scheme, checkpoint.keep).requires_grad_(True)
    calibrate(aware, texts)
    fine_tune(aware, trial.kind, trial.train, recipe, seed, None, trial.metric, progress)
    with torch.no_grad():
        for module in aware.modules():
            if isinstance(module, RoundedNorm):
                module.weight.copy_(round_rows(module.weight[None])[0])
                module.bias.copy_(round_rows(module.bias[None])[0])
    ranges = {name: (float(site.low), float(site.high)) for name, site in sites(aware.mobilebert)}
    with_state(plain, state_of(aware))
    stored = as_scheme(rounded(plain, Storage(keep=checkpoint.keep)), scheme, checkpoint.keep, ranges)
    return plain.eval(), stored.eval(), ranges


# ---- which layers lose most ----------------------------------------------------------------------------------------


def layer_losses(model: TextClassifier, other: TextClassifier, texts: Encoded) -> dict[str, float]:
    """For each linear layer, by name, how far what `other`'s gives of the same input is from `model`'s, as a share of its norm.

    Each is given what the float model reads there, so a layer answers for its own rounding alone.
    """
    theirs = dict(other.mobilebert.named_modules())
    sums: dict[str, Tensor] = {}

    def compare(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
            wrong = theirs[name](given[0]) - result
            pair = torch.stack([wrong.double().square().sum(), result.double().square().sum()])
            sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + pair

        return hook

    mine = [(name, module) for name, module in model.mobilebert.named_modules() if type(module) is nn.Linear]
    hooks = [module.register_forward_hook(compare(name)) for name, module in mine]
    try:
        predict(model, some_rows(texts, COMPARED))
    finally:
        for held in hooks:
            held.remove()
    return {name: float((wrong / whole).sqrt()) if whole else 0.0 for name, (wrong, whole) in sums.items()}
