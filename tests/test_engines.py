"""An exported prediction is the model, in every engine and scheme, and what does not fit is refused in one sentence."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pocketfed.model import checkpoints
from pocketfed.model.checkpoints import Checkpoint, CheckpointError
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.engines import (
    RUNS,
    EngineError,
    check_engine,
    compare,
    measure_ranges,
    open_onnx,
    open_prediction,
    random_batches,
)
from pocketfed.model.exporting import classifier_of, encoded, export_prediction
from pocketfed.model.fusing import fuse
from pocketfed.model.heads import TextClassifier
from pocketfed.model.prediction import SCHEMES, prediction_graph
from pocketfed.model.tokenization import SPECIAL_TOKENS, Vocabulary

SMALL = MobileBertConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    intra_bottleneck_size=8,
    embedding_size=6,
    num_feedforward_networks=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)
TEXTS = ("play a song", "turn on the light", "wake me up", "is it cold")
TOKENS = (*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"))
LARGEST = {"float32": 1e-5, "int8": 0.1, "int8-dynamic": 0.1, "int8-static": 0.1}
PAIRS = [(engine, scheme) for engine in ("onnx", "openvino") for scheme in RUNS[engine]]


def needs(engine: str) -> None:
    package = {"onnx": "onnxruntime"}.get(engine, engine)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{engine} is not installed; run: pip install 'pocketfed[{engine}]'")


def checkpoint(head: bool = True, **changes: Any) -> Checkpoint:
    torch.manual_seed(0)
    config = SMALL.with_changes(vocab_size=len(TOKENS), **changes)
    model = TextClassifier(config, 3, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    state = {name.removeprefix("mobilebert."): value for name, value in model.state_dict().items()}
    if not head:
        state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    return Checkpoint(config, state, TOKENS, ("a", "b", "c") if head else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("students") / "student"
    checkpoints.save(checkpoint(), path)
    return path


@pytest.mark.parametrize(("engine", "scheme"), PAIRS)
def test_an_export_is_the_model_on_random_and_real_texts_of_any_batch_and_length(
    engine: str, scheme: str, folder: Path, tmp_path: Path
) -> None:
    needs(engine)
    out = tmp_path / "exported"
    made = export_prediction(folder, out, engine, scheme, texts=TEXTS)
    assert made.error <= LARGEST[scheme]
    assert made.outputs == ("a", "b", "c")
    assert made.texts == 6 + len(TEXTS) + 8, "three random batches, those given, and the sentences it has"
    predict, model = open_prediction(out, engine), classifier_of(checkpoint())
    for shape in ((1, 3), (5, 17), (2, 32)):
        assert compare(model, predict, random_batches(len(TOKENS), 3, 32, 7, shape)).error <= LARGEST[scheme]
    fixed = open_prediction(out, engine, shape=(2, 32))
    assert compare(model, fixed, random_batches(len(TOKENS), 3, 32, 8, (2, 32))).error <= LARGEST[scheme]
    assert [p.name for p in tmp_path.iterdir()] == ["exported"], "nothing is left beside it"


@pytest.mark.slow
def test_executorch_takes_one_batch_and_length(folder: Path, tmp_path: Path) -> None:
    needs("executorch")
    made = export_prediction(folder, tmp_path / "p.pte", "executorch", texts=TEXTS, batch=2, length=12)
    assert made.error <= LARGEST["float32"]
    predict = open_prediction(tmp_path / "p.pte", "executorch")
    assert predict(*random_batches(len(TOKENS), 3, 32, 7, (2, 12))[0]).shape == (2, 3)


def test_a_model_without_a_head_gives_the_vector_that_a_head_would_read(tmp_path: Path) -> None:
    checkpoints.save(checkpoint(head=False), tmp_path / "student")
    made = export_prediction(tmp_path / "student", tmp_path / "out.onnx", "onnx")
    assert made.outputs == ()
    ids, mask = np.array([[2, 9, 3]]), np.ones((1, 3), np.int64)
    got = open_prediction(tmp_path / "out.onnx", "onnx")(ids, mask)
    with torch.no_grad():
        last = classifier_of(checkpoint(head=False)).mobilebert(torch.from_numpy(ids), torch.from_numpy(mask)).last
    np.testing.assert_allclose(got, last[:, 0].numpy(), rtol=0, atol=1e-5)


def test_a_head_without_labels_is_told_from_no_head(tmp_path: Path) -> None:
    plain = checkpoint()
    head = {"classifier.weight": plain.state["classifier.weight"][:1], "classifier.bias": torch.zeros(1)}
    checkpoints.save(dataclasses.replace(plain, state={**plain.state, **head}, labels=None), tmp_path / "regression")
    made = export_prediction(tmp_path / "regression", tmp_path / "out.onnx", "onnx")
    assert made.outputs == ("LABEL_0",)


@pytest.mark.parametrize("task", ["tokens", "spans"])
def test_a_head_that_reads_every_token_gives_one_row_a_token(task: str, tmp_path: Path) -> None:
    checkpoints.save(checkpoint(), tmp_path / "student")
    export_prediction(tmp_path / "student", tmp_path / "out.onnx", "onnx", task=task)
    ids = np.array([[2, 9, 8, 3]])
    assert open_prediction(tmp_path / "out.onnx", "onnx")(ids, np.ones_like(ids)).shape == (1, 4, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"key_query_shared_bottleneck": False, "use_bottleneck_attention": True},
        {"normalization_type": "layer_norm", "hidden_act": "gelu", "mask_style": "soft"},
        {"pooling": "mean", "head_norm": True},
    ],
)
def test_other_wirings_norms_and_poolings_are_products_of_integers_too(changes: dict[str, Any]) -> None:
    made = checkpoint(num_hidden_layers=1, **changes)
    model, batches = classifier_of(made), random_batches(len(TOKENS), 3, 32, 2)
    student = fuse(model)
    ranges = measure_ranges(prediction_graph(student), batches)
    for scheme in SCHEMES[2:]:
        graph = prediction_graph(student, scheme, ranges)
        assert compare(model, open_onnx(graph.SerializeToString()), batches).error <= LARGEST[scheme]


def test_every_product_but_the_heads_is_of_integers_and_residuals_cost_no_operation_in_float32() -> None:
    """A block: outer, inner, attended, two networks of two, widened: 8; two blocks and the embeddings' widening: 17."""
    student = fuse(classifier_of(checkpoint()))
    counts = {}
    for scheme in ("float32", "int8-dynamic"):
        nodes = [node.op_type for node in prediction_graph(student, scheme).graph.node]
        counts[scheme] = {op: nodes.count(op) for op in ("Gemm", "DynamicQuantizeMatMul", "Add")}
    assert counts["float32"]["Gemm"] == 17 + 1
    assert counts["int8-dynamic"]["DynamicQuantizeMatMul"] == 17
    assert counts["int8-dynamic"]["Gemm"] == 1
    assert counts["int8-dynamic"]["Add"] - counts["float32"]["Add"] == 2 * 4, "four residuals a block"


def test_the_int8_file_is_a_fourth_of_the_float32_one(tmp_path: Path) -> None:
    wide = checkpoint(hidden_size=64, intra_bottleneck_size=32, intermediate_size=128, embedding_size=32)
    student = fuse(classifier_of(wide))
    sizes = {scheme: prediction_graph(student, scheme).ByteSize() for scheme in ("float32", "int8-dynamic")}
    bare = sum(4 * t.numel() for t in student.state_dict().values())
    assert bare < sizes["float32"] < 1.15 * bare
    assert sizes["int8-dynamic"] < 0.45 * sizes["float32"], "names and shapes weigh something in a model so small"


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_scheme_that_an_engine_cannot_run_is_named_with_those_it_can() -> None:
    with pytest.raises(
        EngineError, match="openvino cannot run the scheme 'int8-dynamic'; choose one of float32, int8, int8-static"
    ):
        check_engine("openvino", "int8-dynamic")
    with pytest.raises(EngineError, match="executorch cannot run the scheme 'int8'; choose one of float32"):
        check_engine("executorch", "int8")
    with pytest.raises(EngineError, match="onnx knows no scheme 'int2'; choose one of float32, int8, int8-dynamic"):
        check_engine("onnx", "int2")
    with pytest.raises(EngineError, match="there is no engine 'tflite'; choose one of onnx, openvino, executorch"):
        check_engine("tflite", "float32")


@pytest.mark.parametrize("engine", ["openvino", "executorch"])
def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    engine: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)  # as if it were not installed
    arguments = ["export", str(folder), "--to", engine, "--plan", "predict", "--out", str(tmp_path / "out")]
    assert command(arguments, monkeypatch) == 1
    assert capsys.readouterr().err == (
        f"pocketfed: export needs {engine}, which is not installed; run: pip install 'pocketfed[{engine}]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_architecture_and_weights_that_are_not_finite_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "bert"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="describes a 'bert'; only mobilebert can be read"):
        export_prediction(other, tmp_path / "out.onnx", "onnx")
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    held["classifier.bias"][1] = float("nan")
    (other / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(held, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"classifier\.bias holds a value that is NaN or infinite"):
        export_prediction(other, tmp_path / "out.onnx", "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


def test_a_file_of_another_kind_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"there is nothing at .*; export a model there first"):
        open_prediction(tmp_path / "none", "onnx")
    (tmp_path / "text").write_text("not a graph")
    with pytest.raises(EngineError, match="is not a prediction that onnx can open"):
        open_prediction(tmp_path / "text", "onnx")
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    two = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [one], [two])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "relu").write_bytes(model.SerializeToString())
    with pytest.raises(
        EngineError, match="takes x and gives y: a model of another kind; give one that takes input_ids"
    ):
        open_prediction(tmp_path / "relu", "onnx")


def test_static_ranges_need_texts_and_an_export_that_differs_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="measures the ranges of values on texts, and there are none"):
        export_prediction(folder, tmp_path / "out.onnx", "onnx", "int8-static")
    with pytest.raises(EngineError, match="there are no texts to measure ranges on"):
        measure_ranges(prediction_graph(fuse(classifier_of(checkpoint()))), [])
    (tmp_path / "out.onnx").write_text("an earlier export")
    monkeypatch.setitem(__import__("pocketfed.model.engines", fromlist=["x"]).LARGEST_ERROR, "int8", 1e-9)
    with pytest.raises(EngineError, match=r"the export for onnx differs from the model by .* of its largest output"):
        export_prediction(folder, tmp_path / "out.onnx", "onnx", "int8")
    assert (tmp_path / "out.onnx").read_text() == "an earlier export"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_a_place_that_is_taken_by_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("dear")
    with pytest.raises(EngineError, match="taken is a folder; name a file for the model"):
        export_prediction(folder, tmp_path / "taken", "onnx")
    needs("openvino")
    with pytest.raises(
        EngineError, match=r"taken holds diary\.txt and is no OpenVINO model; name a new or an empty folder"
    ):
        export_prediction(folder, tmp_path / "taken", "openvino")


def test_texts_are_encoded_as_a_program_of_one_shape_takes_them() -> None:
    batches = encoded(["a b", "c", "d"], Vocabulary(TOKENS, True), 32, (2, 6))
    assert [ids.shape for ids, _ in batches] == [(2, 6), (2, 6)]
    assert [mask.sum(1).tolist() for _, mask in batches] == [[4, 3], [3, 2]], "the last one is empty: [CLS] [SEP]"


# ---- the command -----------------------------------------------------------------------------------------------------


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    from pocketfed.cli.main import main

    monkeypatch.setattr(sys, "argv", ["pocketfed", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_writes_a_prediction_and_says_how_near_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    out = tmp_path / "static.onnx"
    static = ["--scheme", "int8-static", "--calibrate", str(texts)]
    assert command(["export", str(folder), "--to", "onnx", *static, "--out", str(out), "--json"], monkeypatch) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == out.stat().st_size
    assert report["error"] <= LARGEST["int8-static"]
    assert (report["engine"], report["scheme"], report["outputs"]) == ("onnx", "int8-static", ["a", "b", "c"])
    assert command(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "wide.onnx")], monkeypatch) == 0
    assert "float32 for onnx, gives 3 logits (a, b, c); within " in capsys.readouterr().out


def test_the_command_refuses_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    wrong = {
        ("--to", "onnx", "--plan", "train"): "a training step is not exported to 'onnx'",
        ("--to", "onnx", "--plan", "fit"): "--plan 'fit' is nothing to export; choose predict or train",
        ("--to", "onnx", "--scheme", "int4"): "onnx knows no scheme 'int4'; choose one of float32",
        ("--to", "onnx", "--scheme", "int8-static", "--calibrate", str(tmp_path / "empty.txt")): "holds no text",
        ("--to", "onnx", "--task", "intents"): "there is no task 'intents'; choose one of classification",
        ("--to", "onnx", "--scheme", "int8-static"): "measures the ranges of values on texts, and there are none",
    }
    for options, sentence in wrong.items():
        assert command(["export", str(folder), *options, "--out", str(tmp_path / "o")], monkeypatch) == 1
        error = capsys.readouterr().err
        assert sentence in error
        assert "unexpected" not in error
        assert error.count("\n") == 1
