"""The ExecuTorch program computes what autograd and the ONNX plan compute, and training with it goes the same way."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketfed.model.adapters import get_theta, select, set_theta
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.executorch_export import METHOD, export_executorch, load_method, reference
from pocketfed.model.heads import TextClassifier
from pocketfed.model.plans import BACKBONE_FILE, Backbone, PlanError, build_plans

TOLERANCE = 1e-4
BATCH, LENGTH, LABELS, SEP = 3, 8, 5, 3
SMALL = MobileBertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    intra_bottleneck_size=8,
    embedding_size=6,
    num_feedforward_networks=2,
    max_position_embeddings=16,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)
VARIANTS: dict[str, tuple[str, bool, dict[str, Any]]] = {  # trainable set, int8, changes of the config
    "lora-int8": ("lora:4", True, {}),
    "norms-int8": ("norms", True, {"pooling": "mean", "head_norm": True, "mask_style": "soft"}),
    "full-gelu": ("full", False, {"normalization_type": "layer_norm", "hidden_act": "gelu"}),
}
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="executorch is not installed; run: pip install 'pocketfed[executorch]'",
)


@dataclass(frozen=True)
class Made:
    model: TextClassifier
    path: Path
    train: Any


def random_model(name: str, changes: dict[str, Any]) -> TextClassifier:
    torch.manual_seed(0)
    model = TextClassifier(SMALL.with_changes(**changes), LABELS, SEP)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return select(model, name, 0).eval()


def random_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last row is shorter; the first is a pair of texts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, SMALL.vocab_size, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    ids[0, 3] = SEP
    return ids * mask, mask, torch.randint(LABELS, (BATCH,), generator=generator)


def distant_theta(model: TextClassifier, seed: int) -> Tensor:
    """Not the values the file was made at, and far from those that it was checked at."""
    theta = torch.from_numpy(get_theta(model))
    return theta + 0.1 * torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, quantized, changes = VARIANTS[request.param]
    model = random_model(name, changes)
    path = tmp_path_factory.mktemp("executorch") / "step.pte"
    exported = export_executorch(model, path, batch=BATCH, length=LENGTH, quantized=quantized)
    assert exported.bytes == path.stat().st_size
    assert exported.parameters == get_theta(model).size
    assert exported.delegates >= 1
    assert exported.error <= TOLERANCE
    assert [p.name for p in path.parent.iterdir()] == ["step.pte"]
    return Made(model, path, load_method(path, METHOD))


@pytest.mark.slow
@needs_executorch
def test_loss_and_gradient_are_those_of_autograd_at_other_weights(made: Made) -> None:
    for seed in (11, 12):
        ids, mask, labels = random_batch(seed)
        theta = distant_theta(made.model, seed)
        loss, correct, gradient = made.train.execute((theta, ids, mask, labels))
        wanted_loss, wanted = reference(made.model, theta, ids, mask, labels)
        assert wanted.abs().max() > 1e-3, "nothing to compare"
        assert abs(loss - wanted_loss) <= TOLERANCE * wanted_loss
        assert relative(gradient, wanted) <= TOLERANCE
        before = get_theta(made.model)
        set_theta(made.model, theta.numpy())
        right = (made.model(ids, mask).argmax(-1) == labels).sum().item()
        set_theta(made.model, before)
        assert correct.item() == right


@pytest.mark.slow
@needs_executorch
def test_an_app_feeds_it_what_it_feeds_the_onnx_plan_and_gets_the_same(made: Made, tmp_path: Path) -> None:
    import onnxruntime

    backbone = Backbone(quantized=False)  # the model's frozen weights are rounded already
    plans = build_plans(made.model, "any", backbone)
    (tmp_path / "train.onnx").write_bytes(plans.files["train"])
    (tmp_path / BACKBONE_FILE).write_bytes(backbone.data)
    session = onnxruntime.InferenceSession(str(tmp_path / "train.onnx"), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    inputs = (distant_theta(made.model, 5), *random_batch(5))
    wanted = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    found = made.train.execute(inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.numpy().shape == np.shape(theirs)
        assert mine.numpy().dtype == np.asarray(theirs).dtype
    assert found[1].item() == wanted[1]
    assert relative(found[2], torch.from_numpy(wanted[2])) <= TOLERANCE


@pytest.mark.slow
@needs_executorch
def test_three_steps_of_sgd_from_its_initial_values_follow_torch(made: Made) -> None:
    (theta,) = load_method(made.path, "initial").execute(())
    assert np.array_equal(theta.numpy(), get_theta(made.model))
    leaf = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=0.1)
    start = theta.clone()
    for seed in (21, 22, 23):
        batch = random_batch(seed)
        theta = theta - 0.1 * made.train.execute((theta, *batch))[2]
        leaf.grad = reference(made.model, leaf.detach(), *batch)[1]
        optimizer.step()
    moved = (leaf.detach() - start).abs().max()
    assert moved > 1e-3
    assert (theta - leaf.detach()).abs().max() <= TOLERANCE * moved


@pytest.mark.slow
@needs_executorch
def test_rows_without_a_label_fill_a_batch_and_add_nothing(made: Made) -> None:
    ids, mask, labels = random_batch(31)
    theta = distant_theta(made.model, 31)
    labels[-1] = -1
    loss, _, gradient = made.train.execute((theta, ids, mask, labels))
    wanted_loss, wanted = reference(made.model, theta, ids[:-1], mask[:-1], labels[:-1])
    share = BATCH / (BATCH - 1)
    assert abs(loss * share - wanted_loss) <= TOLERANCE * wanted_loss
    assert relative(gradient * share, wanted) <= TOLERANCE


@pytest.mark.slow
@needs_executorch
def test_a_model_that_is_not_finite_leaves_no_file(tmp_path: Path) -> None:
    model = random_model("head", {})
    with torch.no_grad():
        model.mobilebert.embeddings.LayerNorm.bias[0] = float("nan")
    with pytest.raises(PlanError, match="differs from the model by inf"):
        export_executorch(model, tmp_path / "step.pte", batch=2, length=4, quantized=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_executorch
def test_the_command_writes_the_step_that_an_artifact_of_the_same_seed_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketfed.coordinator.artifacts import trainable_classifier

    folder = tiny_student(tmp_path)
    arguments = ["--to", "executorch", "--labels", "a,b,c", "--set", "lora:2", "--batch", "2", "--length", "6"]
    out = tmp_path / "step.pte"
    assert command(["export", str(folder), *arguments, "--seed", "4", "--out", str(out), "--json"], monkeypatch) == 0
    report = json.loads(capsys.readouterr().out)
    model, quantized = trainable_classifier(folder, "a,b,c", "lora:2", 4)
    assert report["int8"] is quantized is True
    assert report["bytes"] == out.stat().st_size
    assert report["error"] <= TOLERANCE
    (theta,) = load_method(out, "initial").execute(())
    assert np.array_equal(theta.numpy(), get_theta(model))


def tiny_student(folder: Path) -> Path:
    from pocketfed.model.checkpoints import Checkpoint, save
    from pocketfed.model.mobilebert import MobileBert
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(["play some jazz", "will it rain today"], 40)
    torch.manual_seed(1)
    config = SMALL.with_changes(vocab_size=len(vocabulary))
    save(
        Checkpoint(config, MobileBert(config).state_dict(), vocabulary.tokens, quantization="int8"), folder / "student"
    )
    return folder / "student"


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from pocketfed.cli.main import main

    monkeypatch.setattr(sys, "argv", ["pocketfed", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_without_executorch_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)  # as if it were not installed
    assert command(["export", "student", "--out", str(tmp_path / "step.pte")], monkeypatch) == 1
    assert capsys.readouterr().err == (
        "pocketfed: export needs executorch, which is not installed; run: pip install 'pocketfed[executorch]'\n"
    )
    assert command(["export", "student", "--to", "coreml", "--out", str(tmp_path / "step.pte")], monkeypatch) == 1
    assert (
        "'coreml' is nothing to export to; choose onnx, openvino, executorch, huggingface or tf1"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(("batch", "length"), [(0, 8), (2, 0), (2, 17)])
def test_sizes_that_the_model_cannot_take_are_refused(batch: int, length: int, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"give at least one example and a length of 1 to 16"):
        export_executorch(random_model("head", {}), tmp_path / "x.pte", batch=batch, length=length, quantized=False)


def test_the_traced_step_keeps_int8_weights_as_int8_and_computes_what_autograd_does() -> None:
    from pocketfed.model.executorch_export import trace_step
    from pocketfed.model.plans import Backbone, as_shipped

    model = as_shipped(random_model("lora:4", {}), Backbone(quantized=True))
    step = trace_step(model, BATCH, LENGTH, quantized=True)
    held = dict(step.named_buffers())
    assert sum(b.dtype == torch.int8 for b in held.values()) > 10
    assert not any(b.dtype == torch.float32 and b.shape == (50, 6) for b in held.values())  # the embedding is int8 too
    ids, mask, labels = random_batch(1)
    theta = distant_theta(model, 1)
    loss, correct, gradient = step(theta, ids, mask, labels)
    wanted_loss, wanted = reference(model, theta, ids, mask, labels)
    assert 0 <= correct <= BATCH
    assert torch.allclose(loss, wanted_loss, atol=1e-6)
    assert relative(gradient, wanted) <= 1e-5
