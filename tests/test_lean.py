"""The student with its frozen norms folded is the student; with 8-bit activations it is the rounding stated, no more."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pocketfed.model.adapters import get_theta, layout_of, select, set_theta
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.heads import TextClassifier
from pocketfed.model.lean import FoldedOutput, int8_linear, lean
from pocketfed.model.lowering import LoweringError
from pocketfed.model.mobilebert import NoNorm
from pocketfed.model.plans import Backbone, as_shipped, build_plans

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
    normalization_type="no_norm",
)
SETS = (
    "head",
    "norms",
    "norms@1",
    "bias",
    "bias@1",
    "lora:4",
    "lora:4:qv@1",
    "lora:2:o",
    "last:1",
    "last:2",
    "ladder:6",
    "full",
)
GAINS = ("near one", "of random sign", "with zeros")


def model_with_gains(name: str, gains: str, **changes: Any) -> TextClassifier:
    torch.manual_seed(0)
    model = select(TextClassifier(SMALL.with_changes(**changes), 5, 3), name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for module in model.modules():
            if isinstance(module, NoNorm) and gains != "near one":
                module.weight.copy_(torch.randn(module.weight.shape))
                if gains == "with zeros":
                    module.weight[::2] = 0.0
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("gains", GAINS)
@pytest.mark.parametrize("name", SETS)
def test_the_lean_student_gives_the_same_logits_and_gradients(name: str, gains: str) -> None:
    for wiring in ({"key_query_shared_bottleneck": True}, {"key_query_shared_bottleneck": False}):
        reference = model_with_gains(name, gains, **wiring)
        folded = lean(reference)
        gradients, logits = [], []
        for model in (reference, folded):
            out = model(*batch())
            loss = F.cross_entropy(out, torch.tensor([0, 1, 4]))
            trained = [p for p in model.parameters() if p.requires_grad]
            parts = torch.autograd.grad(loss, trained, materialize_grads=True)
            gradients.append(torch.cat([g.reshape(-1) for g in parts]))
            logits.append(out.detach())
        for wanted, got in (logits, gradients):
            assert (got - wanted).abs().max() <= 1e-6 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", SETS)
def test_trainable_parameters_keep_their_names_order_and_values(name: str) -> None:
    reference = model_with_gains(name, "of random sign")
    before = get_theta(reference).tobytes()
    folded = lean(reference)
    assert layout_of(folded) == layout_of(reference)
    assert get_theta(folded).tobytes() == get_theta(reference).tobytes() == before, "the reference is not touched"
    set_theta(folded, get_theta(folded) + 1)
    assert get_theta(reference).tobytes() == before, "nothing is shared"


def test_a_frozen_norm_costs_no_operation_of_its_own_and_a_trained_one_stays() -> None:
    kinds = {name: [type(m) for m in lean(model_with_gains(name, "near one")).modules()] for name in ("head", "norms")}
    assert kinds["head"].count(NoNorm) == 1, "that of the embeddings"
    assert kinds["head"].count(FoldedOutput) == 2 * 4  # blocks times attention, a stacked FFN, the last one, widening
    assert kinds["norms"].count(NoNorm) == 2 * (4 + 2) + 1
    assert FoldedOutput not in kinds["norms"]


def test_layer_norm_which_depends_on_its_input_is_never_folded() -> None:
    model = model_with_gains("head", "near one", normalization_type="layer_norm")
    assert FoldedOutput not in [type(m) for m in lean(model).modules()]
    assert torch.equal(lean(model)(*batch()), model(*batch()))


# ---- 8-bit activations -----------------------------------------------------------------------------------------------


def test_a_row_is_rounded_to_255_steps_of_its_own_largest_value() -> None:
    """(127, 0.5, -63.6) has steps of 1: halves go to even, 0.5 to 0. The second row's steps are 1/127 of 2.54."""
    x = torch.tensor([[127.0, 0.5, -63.6], [2.54, 0.03, -2.54]])
    out = int8_linear(x, torch.eye(3))
    wanted = torch.tensor([[127.0, 0.0, -64.0], [2.54, 0.04, -2.54]])
    assert torch.allclose(out, wanted, atol=1e-6)


def test_a_row_of_zeros_stays_zeros() -> None:
    assert not int8_linear(torch.zeros(2, 3), torch.ones(4, 3)).any()


def test_the_gradient_is_that_of_the_product_without_rounding() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    coming = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(int8_linear(x, weight), x, coming)
    assert torch.allclose(gradient, coming @ weight)


def test_every_frozen_product_but_the_heads_reads_rounded_input_and_a_trained_one_does_not() -> None:
    def products(name: str) -> int:
        model = lean(model_with_gains(name, "near one"), "int8")
        graph = make_fx(lambda ids, mask: model(ids, mask))(*batch()).graph
        return sum(node.target is torch.ops.pocketfed.int8_linear.default for node in graph.nodes)

    in_a_block = 2 + 3 + 1 + 2 * 2 + 1  # bottlenecks; q, k, v; attention's output; two FFNs; the widening
    assert products("head") == 2 * in_a_block + 1  # and the embeddings' transformation
    assert products("lora:4") == 2 * in_a_block + 1, "what LoRA adds to is frozen"
    assert products("bias") == 2 * in_a_block + 1, "a trained bias is added after the product"
    assert products("last:1") == in_a_block + 1
    assert products("full") == 0


def test_8_bit_activations_change_little_and_something() -> None:
    """Each value by at most 1/254 of its row's largest; what comes of it here stays below a tenth."""
    model = model_with_gains("head", "near one")
    exact, rounded = model(*batch()), lean(model, "int8")(*batch())
    assert 1e-4 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_with_8_bit_activations_padding_never_changes_an_example(pooling: str) -> None:
    model = as_shipped(model_with_gains("head", "near one", pooling=pooling), Backbone(True, "int8"))
    ids, mask = batch()
    with torch.no_grad():
        alone = model(ids[:1, :6], mask[:1, :6])
        for more, filler in ((1, 0), (4, 0), (10, 41)):
            padded = model(F.pad(ids[:1, :6], (0, more), value=filler), F.pad(mask[:1, :6], (0, more)))
            assert (padded - alone).abs().max() <= 1e-6 * alone.abs().max()


def test_the_lowered_product_is_the_eager_one(tmp_path: Any) -> None:
    """One product: inputs of every size, a row of zeros, and one with a single huge value."""
    from pocketfed.model.lowering import Lowering, Quantized, Value
    from pocketfed.model.quantization import dequantize, quantize_per_channel

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    q, scale = quantize_per_channel(weight)
    x = torch.randn(3, 4, 8, generator=generator) * torch.logspace(-4, 4, 3)[:, None, None]
    x[0, 0], x[1, 1, 3] = 0.0, 1e6

    from pocketfed.model.lowering import RULES

    low = Lowering(13)
    graph = make_fx(lambda x, w: torch.ops.pocketfed.int8_linear(x, w))(x, dequantize(q, scale)).graph
    node = next(n for n in graph.nodes if n.target is torch.ops.pocketfed.int8_linear.default)
    out = RULES[node.target](
        low, node, (Value(low.shape(x.shape), torch.float32, "x"), Quantized("q", "s", tuple(weight.shape)))
    )
    name = low.name(out)  # may still add a node
    made = onnx.helper.make_graph(
        [*low.nodes, onnx.helper.make_node("Identity", [name], ["y"])],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 4, 6])],
        [onnx.numpy_helper.from_array(v, n) for n, v in low.constants.items()]
        + [onnx.numpy_helper.from_array(q.numpy(), "q"), onnx.numpy_helper.from_array(scale.numpy().reshape(-1), "s")],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(["y"], {"x": x.numpy()})[0])
    wanted = int8_linear(x, dequantize(q, scale))
    size = wanted.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert ((got - wanted).abs() / size).max() <= 1e-5


def test_an_unknown_kind_of_activations_is_refused_and_float_weights_too() -> None:
    with pytest.raises(ValueError, match="activations are 'int4'; choose one of float32, int8"):
        lean(model_with_gains("head", "near one"), "int4")
    backbone = Backbone(True, "int8")
    backbone.quantized = False
    with pytest.raises(LoweringError, match="8-bit activations need a weight that is frozen as int8"):
        build_plans(model_with_gains("head", "near one"), "head", backbone)


def test_folding_rounds_once_so_that_a_gain_of_a_third_is_exact_to_the_last_bit() -> None:
    norm, linear = NoNorm(1), nn.Linear(1, 1)
    with torch.no_grad():
        norm.weight.fill_(1 / 3)
        norm.bias.fill_(0.1)
        linear.weight.fill_(0.7)
        linear.bias.fill_(0.2)
    from pocketfed.model.lean import _scale_rows

    gamma, beta, w, b = (t.item() for t in (norm.weight, norm.bias, linear.weight, linear.bias))
    _scale_rows(linear, norm)
    assert linear.weight.item() == torch.tensor(gamma * w).item()
    assert linear.bias.item() == torch.tensor(gamma * b + beta).item()
