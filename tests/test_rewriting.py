"""A predict plan is rewritten into fewer operations from the same stored bytes; training plans are left as they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pocketfed.model import plans as plans_module
from pocketfed.model.adapters import select
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.heads import TextClassifier
from pocketfed.model.plans import BACKBONE_FILE, Backbone, build_plans

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
    initializer_range=0.2,
)


def model(name: str) -> TextClassifier:
    torch.manual_seed(0)
    return select(TextClassifier(SMALL, 5, 3), name)


def operators(plan: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(plan).graph.node)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("quantized", [True, False])
def test_rewriting_changes_no_logit_and_no_stored_byte(
    activations: str, quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a block, narrow, shared and value are one product and query and key another: 8 of them fall to 5, in all 11 to 8."""
    if activations == "int8" and not quantized:
        pytest.skip("8-bit activations need weights of 8 bits")
    made = {}
    for how in ("rewritten", "as traced"):
        if how == "as traced":
            monkeypatch.setattr(plans_module, "rewritten", lambda nodes, frozen, one: list(nodes))
        backbone = Backbone(quantized, activations)
        plans = build_plans(model("head"), "head", backbone)
        (tmp_path / how).mkdir()
        (tmp_path / how / BACKBONE_FILE).write_bytes(backbone.data)
        (tmp_path / how / "predict.onnx").write_bytes(plans.files["predict"])
        made[how] = (plans, bytes(backbone.data))
    (new, stored), (old, before) = made["rewritten"], made["as traced"]
    assert stored == before
    assert new.files["train"] == old.files["train"]
    assert new.files["evaluate"] == old.files["evaluate"]
    product = "MatMulIntegerToFloat" if activations == "int8" else "Gemm"
    traced = "MatMulInteger" if activations == "int8" else "Gemm"
    assert operators(old.files["predict"])[traced] - operators(new.files["predict"])[product] == 3
    logits = []
    for how in made:
        session = onnxruntime.InferenceSession(str(tmp_path / how / "predict.onnx"), providers=["CPUExecutionProvider"])
        ids = np.array([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
        feed = {"theta": new.theta, "input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
        logits.append(session.run(None, feed)[0])
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-6)


def test_a_product_with_a_trained_weight_is_never_joined() -> None:
    assert operators(build_plans(model("full"), "full", Backbone(True)).files["predict"])["Split"] == 1, "theta's own"


def test_a_frozen_product_under_lora_is_joined_and_what_is_trained_stays_beside_it() -> None:
    """LoRA on query and value: 3 stacked into 1 and 2 into 1, as without it; 2 products for each of the two adapters."""
    counts = operators(build_plans(model("lora:2:qv"), "lora:2:qv", Backbone(True)).files["predict"])
    without = operators(build_plans(model("head"), "head", Backbone(True)).files["predict"])
    assert counts["Gemm"] == without["Gemm"] + 2 * 2
