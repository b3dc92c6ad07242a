"""Plans compute what autograd does: any set, wiring, norm, batch and length, at weights they were not built with."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pocketfed.model.adapters import select, set_theta
from pocketfed.model.config import STUDENTS, MobileBertConfig
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lowering import LoweringError, length_prime
from pocketfed.model.parameters import total_size
from pocketfed.model.plans import (
    BACKBONE_FILE,
    Backbone,
    PlanError,
    Plans,
    as_shipped,
    build_plans,
    verify_plans,
)

TOLERANCE = 1e-5
LABELS = 5
SEP = 3
SMALL = MobileBertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    intra_bottleneck_size=8,
    embedding_size=6,
    num_feedforward_networks=2,
    max_position_embeddings=16,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)
SETS = (
    "head",
    "norms",
    "norms@1",
    "bias",
    "bias@1",
    "lora:4",
    "lora:4:qv@1",
    "last:1",
    "last:2",
    "ladder:6",
    "full",
)
SUFFIXED = ("head", "norms@1", "bias@1", "lora:4:qv@1", "last:1", "ladder:6")  # with whole frozen blocks below
NORMS: dict[str, dict[str, Any]] = {
    "no_norm": {"normalization_type": "no_norm", "hidden_act": "relu"},
    "layer_norm": {"normalization_type": "layer_norm", "hidden_act": "gelu"},
}
WIRINGS: dict[str, dict[str, Any]] = {
    "released": {"key_query_shared_bottleneck": True},
    "tiny": {"key_query_shared_bottleneck": False, "use_bottleneck_attention": True},
    "paper": {"key_query_shared_bottleneck": False},
}
POOLINGS: tuple[dict[str, Any], ...] = ({"pooling": "cls"}, {"pooling": "mean", "head_norm": True})
# Every kind of set with every norm and wiring; for the narrower ones the wirings take turns, as the two poolings do for all.
NARROWER = ("norms@1", "bias@1", "lora:4:qv@1", "last:2")
CONFIGURATIONS = [
    pytest.param(name, NORMS[norm] | WIRINGS[wiring] | POOLINGS[(i + j + k) % 2], id=f"{name}-{norm}-{wiring}")
    for (i, name), (j, norm), (k, wiring) in itertools.product(enumerate(SETS), enumerate(NORMS), enumerate(WIRINGS))
    if name not in NARROWER or (i + j) % 3 == k
]
OTHERS: dict[str, dict[str, Any]] = {
    "soft mask": {"mask_style": "soft"},
    "padding not isolated": {"isolate_padding": False, "mask_style": "soft"},
    "gelu_tanh": {"hidden_act": "gelu_tanh"},
    "relu6": {"hidden_act": "relu6", "initializer_range": 0.6, "head_norm": True},  # wide enough to reach 6
    "tanh pooler": {"classifier_activation": True},
    "a pooler that mean pooling leaves out": {"classifier_activation": True, "pooling": "mean"},
    "no trigram": {"trigram_input": False},
    "a prime number of positions": {"max_position_embeddings": 17},
    "one head, one FFN": {"num_attention_heads": 1, "num_feedforward_networks": 1},
}


def random_model(
    config: MobileBertConfig, name: str, seed: int = 0, noise: float = 0.1, task: str = "classification"
) -> TextClassifier:
    """Every parameter random, gains and biases, LoRA's second matrices and a ladder's head too."""
    torch.manual_seed(seed)
    model = TextClassifier(config, {"regression": 1, "spans": 2}.get(task, LABELS), SEP, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    select(model, name, seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name or parameter_name.startswith("ladder."):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def random_batch(config: MobileBertConfig, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Odd rows are text pairs with a [SEP] in the middle; all rows but the first are shorter than the batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    mask = torch.zeros_like(ids)
    for i in range(batch):
        real = max(min(3, length), length - i)
        mask[i, :real] = 1
        ids[i, 0], ids[i, real - 1] = 2, SEP
        if i % 2:
            ids[i, real // 2] = SEP
    labels = torch.randint(LABELS, (batch,), generator=generator)
    return ids * mask, mask, labels


@dataclass
class Opened:
    """A model as it is shipped, with its plans on disk and open."""

    model: TextClassifier
    plans: Plans
    backbone: Backbone
    folder: Path
    sessions: dict[str, Any]

    @property
    def files(self) -> dict[str, str]:
        return {name: f"{name}.onnx" for name in self.plans.files}

    def run(self, plan: str, feed: dict[str, Any]) -> dict[str, Any]:
        """Only what the plan takes is given."""
        opened = self.sessions[plan]
        taken = {i.name for i in (*opened.get_inputs(), *opened.get_overridable_initializers())}
        outputs = [o.name for o in opened.get_outputs()]
        return dict(zip(outputs, opened.run(outputs, {k: v for k, v in feed.items() if k in taken}), strict=True))

    def step(self, theta: NDArray[np.float32], ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[float, int, Any]:
        feed = {"theta": theta, "input_ids": ids.numpy(), "attention_mask": mask.numpy(), "labels": labels.numpy()}
        got = self.run("train", feed)
        return float(got["loss"]), int(got["correct"]), got["gradient"]

    def logits(self, theta: NDArray[np.float32], ids: Tensor, mask: Tensor) -> NDArray[np.float32]:
        feed = {"theta": theta, "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return np.asarray(self.run("predict", feed)["logits"])


def session(path: Path, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def open_plans(
    folder: Path, model: TextClassifier, name: str, quantized: bool = True, activations: str = "float32"
) -> Opened:
    backbone = Backbone(quantized, activations)
    plans = build_plans(model, name, backbone)
    (folder / BACKBONE_FILE).write_bytes(backbone.data)
    for plan, data in plans.files.items():
        (folder / f"{plan}.onnx").write_bytes(data)
    sessions = {plan: session(folder / f"{plan}.onnx") for plan in plans.files}
    return Opened(as_shipped(model, backbone), plans, backbone, folder, sessions)


def errors_at(
    opened: Opened, shape: tuple[int, int], theta: NDArray[np.float32], weighted: bool = False
) -> dict[tuple[str, str], float]:
    """(plan, output) -> its error, relative to the largest value; counts of right predictions must be equal.

    weighted: give a weight to each example, the last one's 0, and smooth the labels; else leave both inputs out.
    """
    model, (batch, length) = opened.model, shape
    set_theta(model, theta)
    ids, mask, labels = random_batch(model.config, batch, length, seed=100 * batch + length)
    weights = 0.5 + torch.rand(batch, generator=torch.Generator().manual_seed(batch)) if weighted else torch.ones(batch)
    if weighted and batch > 1:
        weights[-1] = 0
    smoothing = 0.2 if weighted else 0.0
    hidden = model.prefix(ids, mask)
    logits = model.suffix(hidden, mask)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    loss = (weights * losses).sum() / weights.sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
    wanted = {
        "hidden": hidden,
        "logits": logits,
        "loss": loss,
        "gradient": torch.cat([g.reshape(-1) for g in gradients]),
        "weight": weights.sum(),
    }
    assert wanted["gradient"].abs().max() > 1e-3, "a saturated model shows nothing"
    feed = {"theta": theta, "input_ids": ids.numpy(), "attention_mask": mask.numpy(), "labels": labels.numpy()}
    if weighted:
        feed |= {"weights": weights.numpy(), "label_smoothing": np.array(smoothing, np.float32)}
    errors = {}
    for plan in opened.plans.files:  # the prefix comes before those that read what it gives
        got = opened.run(plan, feed)
        if "correct" in got:
            assert int(got.pop("correct")) == int(((logits.argmax(1) == labels) & (weights > 0)).sum())
        for output, value in got.items():
            expected = wanted[output].detach().numpy()
            size = np.abs(expected).max() if output == "gradient" else max(1.0, np.abs(expected).max())
            errors[plan, output] = float(np.abs(value - expected).max() / size)
        feed |= {"hidden": got["hidden"]} if plan == "prefix" else {}
    return errors


def largest_error(opened: Opened, shapes: list[tuple[int, int]], theta: NDArray[np.float32]) -> float:
    """Over all plans and shapes; weights and label smoothing take turns with neither."""
    all_errors = [errors_at(opened, shape, theta, weighted=bool(i % 2)) for i, shape in enumerate(shapes)]
    return float(np.max([list(errors.values()) for errors in all_errors]))


def shapes_of(config: MobileBertConfig) -> list[tuple[int, int]]:
    longest = config.max_position_embeddings
    return [(1, 3), (1, longest), (4, 7), (5, longest), (7, 4)]


def moved(plans: Plans, seed: int = 3, scale: float = 0.03) -> NDArray[np.float32]:
    """Other parameters than those the plans were built with: none of them may be baked in."""
    noise = np.random.default_rng(seed).normal(scale=scale, size=plans.theta.shape)
    return plans.theta + noise.astype(np.float32)


@pytest.mark.parametrize(("name", "changes"), CONFIGURATIONS)
def test_loss_correct_logits_and_gradient_of_every_plan_are_those_of_autograd(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = SMALL.with_changes(**changes)
    opened = open_plans(tmp_path, random_model(config, name), name)
    assert len(opened.plans.files) == (7 if name in SUFFIXED else 3)
    for file in opened.files.values():
        onnx.checker.check_model(str(tmp_path / file), full_check=True)
    assert largest_error(opened, shapes_of(config), moved(opened.plans)) <= TOLERANCE


@pytest.mark.parametrize("name", SETS)
def test_with_8_bit_activations_every_plan_is_the_eager_model_but_where_a_value_falls_on_a_border(
    name: str, tmp_path: Path
) -> None:
    """float32 sums in another order: at the border between two of 255 steps a value may fall on either side, rarely."""
    opened = open_plans(tmp_path, random_model(SMALL, name), name, activations="int8")
    operators = {node.op_type for node in onnx.load_from_string(opened.plans.files["train"]).graph.node}
    assert ("MatMulInteger" in operators) == (name != "full")
    theta = moved(opened.plans)
    worst = [max(errors_at(opened, shape, theta, bool(i % 2)).values()) for i, shape in enumerate(shapes_of(SMALL))]
    assert sum(error <= TOLERANCE for error in worst) >= 3, worst
    assert max(worst) < 0.1


@pytest.mark.parametrize("task", ["classification", "regression", "tokens", "spans"])
@pytest.mark.parametrize("name", ["head", "norms", "lora:4:qv@1", "ladder:6"])
def test_every_task_has_plans_that_agree_with_autograd(task: str, name: str, tmp_path: Path) -> None:
    model = random_model(SMALL, name, task=task)
    opened = open_plans(tmp_path, model, name)
    assert verify_plans(model, opened.plans, tmp_path, opened.files, opened.backbone) <= TOLERANCE


@pytest.mark.parametrize("name", SUFFIXED)
def test_prefix_and_suffix_together_are_the_whole_plan(name: str, tmp_path: Path) -> None:
    opened = open_plans(tmp_path, random_model(SMALL, name), name)
    ids, mask, labels = random_batch(SMALL, 4, 9, seed=2)
    feed = {"theta": moved(opened.plans), "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    feed |= {"labels": labels.numpy()} | opened.run("prefix", feed)
    for plan in ("train", "evaluate", "predict"):
        whole, upper = opened.run(plan, feed), opened.run(f"{plan}_suffix", feed)
        for output, value in whole.items():
            np.testing.assert_allclose(upper[output], value, rtol=0, atol=1e-6 * max(1.0, np.abs(value).max()))


def test_a_pooled_prefix_gives_one_row_an_example_and_others_one_a_token(tmp_path: Path) -> None:
    ids, mask, _ = random_batch(SMALL, 4, 9, seed=2)
    shapes = {"head": (4, 16), "norms@1": (4, 9, 16), "ladder:6": (4, 9, 2 * 16)}  # a rung for each of two blocks
    for name, shape in shapes.items():
        (tmp_path / name[:2]).mkdir()
        opened = open_plans(tmp_path / name[:2], random_model(SMALL, name), name)
        hidden = opened.run("prefix", {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["hidden"]
        assert hidden.shape == shape
        assert (opened.plans.hidden_size, opened.plans.keeps_tokens) == (shape[-1], len(shape) == 3)
        assert opened.plans.depth == (1 if name == "norms@1" else 2)


def test_a_session_with_default_options_gives_the_same_numbers_and_no_product_of_8_bit_activations(
    tmp_path: Path,
) -> None:
    """ONNX Runtime rounds activations unasked where int8 weights lie as (in, out): plans must not let it."""
    opened = open_plans(tmp_path, random_model(SMALL.with_changes(hidden_size=64), "norms"), "norms")
    ids, mask, labels = random_batch(SMALL, 3, 9, seed=5)
    feed = {"theta": moved(opened.plans), "input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    for plan, taken in (("train", feed | {"labels": labels.numpy()}), ("predict", feed)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / f"optimized-{plan}.onnx")
        default = onnxruntime.InferenceSession(
            str(tmp_path / f"{plan}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        operators = {node.op_type for node in graph.node}
        assert operators & {"MatMul", "Gemm", "FusedMatMul"}
        assert not operators & {"MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul"}
        mine = opened.run(plan, taken)
        for output, value in zip(mine, default.run(list(mine), taken), strict=True):
            np.testing.assert_allclose(value, mine[output], rtol=0, atol=1e-5 * max(1.0, np.abs(value).max()))


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_the_rarer_choices_of_a_config_have_plans_too(changes: dict[str, Any], tmp_path: Path) -> None:
    config = SMALL.with_changes(**changes)
    opened = open_plans(tmp_path, random_model(config, "full"), "full", quantized=False)
    # Weights wide enough to reach 6: plan and autograd are each within 4e-6 of float64, so not always 1e-5 of each other.
    tolerance = 2 * TOLERANCE if config.hidden_act == "relu6" else TOLERANCE
    assert largest_error(opened, shapes_of(config), moved(opened.plans)) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norms", "full"])
def test_two_blocks_of_the_released_geometry_agree_with_autograd(name: str, tmp_path: Path) -> None:
    config = STUDENTS["mobilebert"].with_changes(num_hidden_layers=2)
    assert config.vocab_size == 30522
    opened = open_plans(tmp_path, random_model(config, name, noise=0.01), name)
    onnx.checker.check_model(str(tmp_path / "train.onnx"))
    assert largest_error(opened, [(1, 3), (3, 40), (1, 512)], moved(opened.plans, scale=0.003)) <= TOLERANCE


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_padding_never_changes_the_logits_of_predict(pooling: str, activations: str, tmp_path: Path) -> None:
    config = SMALL.with_changes(pooling=pooling)
    opened = open_plans(tmp_path, random_model(config, "head"), "head", activations=activations)
    ids, mask, _ = random_batch(config, 1, 6, seed=1)
    alone = opened.logits(opened.plans.theta, ids, mask)
    for more, filler in ((1, 0), (4, 0), (10, 0), (10, 41)):  # whatever stands where the mask is 0
        padded = opened.logits(opened.plans.theta, F.pad(ids, (0, more), value=filler), F.pad(mask, (0, more)))
        assert np.abs(padded - alone).max() <= 1e-6 * np.abs(alone).max()


def test_the_second_text_of_a_pair_has_the_second_type(tmp_path: Path) -> None:
    """[CLS] a [SEP] b [SEP]: the gradient of the second type's embedding is zero only where there is no second text."""
    opened = open_plans(tmp_path, random_model(SMALL, "full"), "full")
    place = next(p for p in opened.plans.layout if p.name.endswith("token_type_embeddings.weight"))
    label, ones = torch.tensor([1]), torch.ones(1, 5, dtype=torch.int64)

    def second_type(ids: list[int]) -> float:
        _, _, gradient = opened.step(opened.plans.theta, torch.tensor([ids]), ones, label)
        return float(np.abs(gradient[place.offset : place.offset + place.size].reshape(place.shape)[1]).max())

    assert second_type([2, 10, 11, 12, SEP]) == 0
    assert second_type([2, 10, SEP, 12, SEP]) > 1e-4


def test_a_gradient_is_the_same_bits_on_every_run_and_on_any_number_of_threads(tmp_path: Path) -> None:
    """Many tokens share a row of the embedding tables here; adds that race would lose some of them."""
    config = SMALL.with_changes(max_position_embeddings=64, hidden_size=64, embedding_size=64)
    opened = open_plans(tmp_path, random_model(config, "full"), "full")
    ids = np.random.default_rng(0).integers(4, 7, (32, 64))
    feed = {"theta": opened.plans.theta, "input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids[:, 0] - 4}
    first = opened.run("train", feed)["gradient"].tobytes()
    many = session(tmp_path / "train.onnx", threads=4)
    for _ in range(8):
        assert opened.run("train", feed)["gradient"].tobytes() == first
    tables = [p for p in opened.plans.layout if "word_embeddings" in p.name or "token_type" in p.name]
    one = np.frombuffer(first, np.float32)
    for _ in range(8):
        gradient = many.run(["gradient"], feed)[0]
        for p in tables:
            part = slice(p.offset, p.offset + p.size)
            assert np.abs(gradient[part] - one[part]).max() <= 1e-4 * np.abs(one).max()


def test_the_scatter_that_races_is_in_no_plan(tmp_path: Path) -> None:
    opened = open_plans(tmp_path, random_model(SMALL, "full"), "full")
    operators = {node.op_type for node in onnx.load_from_string(opened.plans.files["train"]).graph.node}
    assert "ScatterElements" in operators
    assert "ScatterND" not in operators


def test_an_int8_backbone_is_smaller_than_a_third_of_a_float32_one() -> None:
    sizes = {}
    for quantized in (True, False):
        backbone = Backbone(quantized)
        build_plans(random_model(STUDENTS["nano"].with_changes(num_hidden_layers=1), "head"), "head", backbone)
        sizes[quantized] = len(backbone.data)
    assert sizes[True] * 3 < sizes[False]


def test_int8_plans_agree_with_a_model_of_rounded_matrices_and_differ_from_the_float_one(tmp_path: Path) -> None:
    opened = open_plans(tmp_path, random_model(SMALL, "head"), "head")
    ids, mask, _ = random_batch(SMALL, 3, 9, seed=5)
    shipped = opened.logits(opened.plans.theta, ids, mask)
    with torch.no_grad():
        rounded, exact = opened.model(ids, mask).numpy(), random_model(SMALL, "head")(ids, mask).numpy()
    assert np.abs(shipped - rounded).max() < 1e-5
    assert 1e-4 < np.abs(shipped - exact).max() < 0.1 * np.abs(exact).max()


def external(plan: bytes) -> dict[str, tuple[int, int]]:
    """Where a plan's external tensors lie in the backbone file: offset and length."""
    places = {}
    for tensor in onnx.load_from_string(plan).graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            assert entries["location"] == BACKBONE_FILE
            places[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return places


def test_sets_share_one_backbone_file_in_which_each_content_is_stored_once() -> None:
    backbone = Backbone(quantized=True)
    sizes, plans = [], []
    for name in ("head", "lora:4:qv", "ladder:6", "norms", "norms@1"):
        built = build_plans(random_model(SMALL, name), name, backbone)
        sizes.append(len(backbone.data))
        plans += [external(plan) for plan in built.files.values()]
    assert sizes[0] == sizes[1] == sizes[2], "all that LoRA on queries and values and a ladder freeze, the head froze"
    assert sizes[2] < sizes[3] == sizes[4], (
        "where norms are trained they are not folded: other products, shared in turn"
    )
    spans = sorted(set().union(*(places.values() for places in plans)))
    assert {offset for offset, _ in spans} == set(backbone.places.values())
    contents = [bytes(backbone.data[offset : offset + length]) for offset, length in spans]
    assert len(set(contents)) == len(contents)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(spans)), "tensors overlap"
    assert all(offset % 64 == 0 for offset, _ in spans)
    assert len(backbone.data) - sum(length for _, length in spans) < 64 * len(spans), "what is not tensors is alignment"


def test_a_plan_of_the_full_set_needs_no_backbone_at_all() -> None:
    backbone = Backbone(quantized=True)
    plans = build_plans(random_model(SMALL, "full"), "full", backbone)
    assert backbone.data == b""
    assert [external(plan) for plan in plans.files.values()] == [{}, {}, {}]
    assert total_size(plans.layout) == plans.theta.size


def test_the_same_model_gives_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        backbone = Backbone(quantized=True)
        plans = build_plans(random_model(SMALL, "lora:2"), "lora:2", backbone)
        made.append((*plans.files.values(), plans.theta.tobytes(), bytes(backbone.data)))
    assert made[0] == made[1]


def test_a_plan_uses_standard_operators_only_and_leaves_batch_and_length_open() -> None:
    plans = build_plans(random_model(SMALL, "norms"), "norms", Backbone(quantized=True))
    graph = onnx.load_from_string(plans.files["train"])
    assert {o.domain for o in graph.opset_import} == {""}
    assert {n.domain for n in graph.graph.node} == {""}
    dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.graph.input}
    assert dims == {
        "theta": [plans.theta.size],
        "labels": ["batch"],
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "weights": ["batch_or_one"],
        "label_smoothing": [],
    }
    defaults = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer if t.name in dims}
    assert {name: value.tolist() for name, value in defaults.items()} == {"weights": [1.0], "label_smoothing": 0.0}
    assert [o.name for o in graph.graph.output] == ["loss", "correct", "gradient", "weight"]
    evaluate = onnx.load_from_string(plans.files["evaluate"]).graph
    assert [o.name for o in evaluate.output] == ["loss", "correct", "weight"]
    assert len(evaluate.node) < len(graph.graph.node) / 2, "no gradient is computed"
    predict = onnx.load_from_string(plans.files["predict"]).graph
    assert [i.name for i in predict.input] == ["theta", "input_ids", "attention_mask"]


def test_verification_accepts_a_models_own_plans_and_refuses_those_of_other_weights(tmp_path: Path) -> None:
    opened = open_plans(tmp_path, random_model(SMALL, "norms", seed=0), "norms")
    model, other = (random_model(SMALL, "norms", seed) for seed in (0, 1))
    assert verify_plans(model, opened.plans, tmp_path, opened.files, opened.backbone) < TOLERANCE
    with pytest.raises(PlanError, match="the plan of 'norms' differs from the model by"):
        verify_plans(other, opened.plans, tmp_path, opened.files, opened.backbone)


@pytest.mark.parametrize("value", [3.0, np.nan])
@pytest.mark.parametrize("plan", ["predict", "prefix"])
def test_verification_refuses_a_backbone_with_one_changed_weight_and_one_that_is_not_finite(
    plan: str, value: float, tmp_path: Path
) -> None:
    model = random_model(SMALL, "head")
    opened = open_plans(tmp_path, model, "head", quantized=False)
    data = bytearray((tmp_path / BACKBONE_FILE).read_bytes())
    name = "mobilebert.encoder.layer.1.output.bottleneck.dense.bias"
    offset, _ = external(opened.plans.files[plan])[name]
    data[offset : offset + 4] = np.float32(value).tobytes()
    (tmp_path / BACKBONE_FILE).write_bytes(data)
    with pytest.raises(PlanError, match="differs from the model"):
        verify_plans(model, opened.plans, tmp_path, opened.files, opened.backbone)


def test_8_bit_activations_without_int8_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="int8 activations need int8 weights; quantize the backbone too"):
        Backbone(quantized=False, activations="int8")


def test_a_length_prime_divides_no_size_and_where_there_is_none_the_remedy_is_named() -> None:
    assert length_prime(16, {8, 24, 50}) == 13
    assert length_prime(16, {26, 22, 8}) == 7
    with pytest.raises(LoweringError, match="raise max_position_embeddings"):
        length_prime(5, {15})


def test_an_operator_without_a_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketfed.model import lowering

    monkeypatch.delitem(lowering.RULES, torch.ops.aten.relu.default)
    with pytest.raises(LoweringError, match=r"aten\.relu\.default has no ONNX form in model/lowering\.py; add a rule"):
        build_plans(random_model(SMALL, "head"), "head", Backbone(quantized=False))


def test_a_manifest_lists_each_parameter_where_its_plan_reads_it(nano_built: Any) -> None:
    raw = json.loads((nano_built.folder / "manifest.json").read_bytes())
    for described in raw["trainable_sets"].values():
        graph = onnx.load(str(nano_built.folder / described["train"]), load_external_data=False).graph
        split = next(n for n in graph.node if n.op_type == "Split")
        sizes = onnx.numpy_helper.to_array(next(t for t in graph.initializer if t.name == split.input[1]))
        stated = [int(np.prod(p["shape"])) for p in described["parameters"]]
        assert sizes.tolist() == stated
        assert [p["offset"] for p in described["parameters"]] == [0, *np.cumsum(stated)[:-1].tolist()]
        assert described["size"] == sum(stated)
