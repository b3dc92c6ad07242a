"""Schemes: each is stored, read back and used; what it costs is told; what cannot be is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pocketfed.coordinator.quantizing import QuantizeOptions, quantize
from pocketfed.model import checkpoints
from pocketfed.model.calibration import best_range, calibrate, encode_calibration, read_calibration
from pocketfed.model.checkpoints import Checkpoint, CheckpointError, load, tokens_of
from pocketfed.model.config import preset
from pocketfed.model.downstream import classifier_of, layer_losses, quantized, rounded, state_of, trial_of
from pocketfed.model.encoded import Encoded, Kind
from pocketfed.model.fake_quant import SCORE_CLIP, Site, as_scheme, round_rows, sites
from pocketfed.model.finetuning import Recipe, fine_tune, make_model, predict
from pocketfed.model.mobilebert import NoNorm
from pocketfed.model.quantization import QuantizationError, Storage, dequantize, quantize_per_channel
from pocketfed.model.schemes import SCHEMES, read_ranges, write_ranges
from pocketfed.model.supervision import Classification, kind_of
from pocketfed.model.tasks import Dataset, Example
from pocketfed.model.tokenization import Tokenizer, train_vocabulary

RECIPE = Recipe(epochs=6, batch_size=8, learning_rate=3e-3, max_length=16)


@pytest.fixture(scope="module")
def tuned(tiny_dataset: Dataset) -> Checkpoint:
    """A `nano` fine-tuned on the tiny data set until it makes no more than one mistake on its test."""
    vocabulary = train_vocabulary((e.text for e in tiny_dataset.train), 200)
    config = preset("nano").with_changes(vocab_size=len(vocabulary))
    kind = kind_of(tiny_dataset)
    model = make_model(config, {}, vocabulary.sep_id, kind, seed=1)
    fine_tune(model, kind, kind.encode(tiny_dataset.train, Tokenizer(vocabulary), 16), RECIPE, seed=1)
    return Checkpoint(config, state_of(model), vocabulary.tokens, tiny_dataset.labels)


@pytest.fixture(scope="module")
def folder(tuned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "model"
    checkpoints.save(tuned, path, "# tuned\n")
    return path


@pytest.fixture(scope="module")
def texts(tuned: Checkpoint, tiny_dataset: Dataset) -> Encoded:
    return encode_calibration(tiny_dataset.train, Tokenizer(tokens_of(tuned)), 16)


def explode(checkpoint: Checkpoint, channels: list[int], factor: float) -> Checkpoint:
    """The same function with some channels between block 0 and 1 `factor` times as large, undone by whoever reads them."""
    state = {name: value.clone() for name, value in checkpoint.state.items()}
    one, two = "encoder.layer.0.", "encoder.layer.1."
    for suffix in ("weight", "bias"):
        state[f"{one}output.bottleneck.LayerNorm.{suffix}"][channels] *= factor
        state[f"{two}output.bottleneck.dense.{suffix}"][channels] *= factor  # added to them
    state[f"{two}output.bottleneck.LayerNorm.weight"][channels] /= factor
    for reader in ("bottleneck.input.dense", "bottleneck.attention.dense", "attention.self.value"):
        state[f"{two}{reader}.weight"][:, channels] /= factor
    return dataclasses.replace(checkpoint, state=state)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_a_folder_that_is_read_back_and_says_what_it_cost(
    scheme: str, folder: Path, tuned: Checkpoint, tiny_folder: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(scheme, dev=tiny_folder, max_length=16, epochs=2, batch_size=8)
    report = quantize(folder, tmp_path / "out", options)
    read = load(tmp_path / "out")
    assert (read.quantization, read.labels) == (scheme, tuned.labels)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"] == scheme
    assert {value.dtype for value in read.state.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "quantization.json").read_text()) == {
        key: value for key, value in report.items() if key != "folder"
    }
    assert report["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report["ratio"] > (5 if scheme == "int4" else 3)
    assert (read.ranges is not None) == scheme.startswith(("int8-static", "int8-qat"))
    worst = report["worst"][0]
    assert f"{worst}.weight" in report["errors"]
    assert worst in (tmp_path / "out" / "README.md").read_text()
    error = report["errors"]["encoder.layer.0.attention.self.query.weight"]
    assert 0 < error["mean"] < error["largest"]
    assert 0 < error["output"] < 0.5
    dev = report["dev"]
    assert (dev["examples"], dev["metric"], dev["split"]) == (24, "accuracy", "test")
    assert dev["lost"] == dev["float"] - dev["quantized"]
    assert dev["float"] >= 95
    assert dev["lost"] <= 100 / 24 + 1e-9, "no more than one text more is taken for another"
    if scheme == "int8-qat":  # which would go on training
        return
    # Quantizing what was read by the same scheme changes no weight: it is rounded already.
    again = quantize(tmp_path / "out", tmp_path / "again", QuantizeOptions(scheme, dev=tiny_folder, max_length=16))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    assert again["largest_error"] == 0
    assert again["sha256"] == report["sha256"]


def test_an_int4_folder_is_evaluated_by_the_device_s_own_plans(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from pocketfed.client_sdk.trainer import TrainConfig
    from pocketfed.simulations.central import evaluate_model

    report = quantize(folder, tmp_path / "out", QuantizeOptions("int4", dev=tiny_folder, max_length=16))
    config = TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3, max_length=16, seed=0)
    measured = evaluate_model(tmp_path / "out", tiny_folder, "head", config)
    assert not measured["fine_tuned"]
    assert 100 * measured["accuracy"] == pytest.approx(report["dev"]["quantized"], abs=100 / 24 + 1e-9)


# ---- the arithmetic ------------------------------------------------------------------------------------------------


def test_training_rounds_weights_to_what_is_stored_and_passes_the_gradient_through() -> None:
    weight = torch.tensor([[0.3, -1.0, 0.004], [2.0, 0.1, 0.0]], requires_grad=True)
    rounded_weight = round_rows(weight)
    assert torch.equal(rounded_weight.detach(), dequantize(*quantize_per_channel(weight)))
    rounded_weight.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, torch.ones(2, 3))  # type: ignore[arg-type]


def test_a_site_rounds_to_256_steps_of_its_range_and_zero_stays_zero() -> None:
    site = Site().eval()
    site.low, site.high = torch.tensor(-1.0), torch.tensor(4.1)  # 5.1 / 255: steps of 0.02
    x = torch.tensor([0.0, 0.019, -0.011, 3.0, 9.0, -9.0])
    assert site(x).tolist() == pytest.approx([0.0, 0.02, -0.02, 3.0, 4.1, -1.0], abs=1e-6)


def test_a_range_keeps_all_that_was_seen_unless_a_few_large_values_cost_the_others_too_much() -> None:
    even = torch.linspace(-1, 1, 2000)
    assert [float(end) for end in best_range(even, torch.tensor(-1.0), torch.tensor(1.0))] == [-1, 1]
    # n values between 0 and 1 and one of 2: a range of r costs n (r / 255)^2 / 12 + (2 - r)^2. For 1,000 that is 0.0051 at
    # 2 and 0.0146 at 1.9; for 100,000 it is 0.51 at 2, 0.455 at 1.8 and 0.460 at 1.7.
    for count, wanted in ((1_000, 2.0), (100_000, 1.8)):
        seen = torch.cat([torch.rand(count, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0])])
        low, high = best_range(seen, torch.tensor(0.0), torch.tensor(2.0))
        assert (float(low), float(high)) == (0.0, pytest.approx(wanted))


def test_dynamic_activations_are_those_that_the_device_s_plans_round_to(
    tuned: Checkpoint, texts: Encoded, tiny_dataset: Dataset
) -> None:
    from pocketfed.model.lean import lean

    kind = kind_of(tiny_dataset)
    trial = trial_of(tuned, tiny_dataset, 16)
    model = classifier_of(tuned, trial, RECIPE, 0)
    model.requires_grad_(False)
    made, ranges = quantized(model, SCHEMES["int8-dynamic"], Storage(), None)
    assert ranges is None
    shipped = lean(rounded(model, Storage()), "int8")
    ours, theirs = (np.stack(predict(m, texts)) for m in (made, shipped))
    exact = np.stack(predict(model, texts))
    # Plans fold norms first, so a value at the border between two steps may fall on either side.
    assert np.abs(ours - theirs).max() < np.abs(ours - exact).max()
    assert kind.outputs == ours.shape[1]


def test_static_ranges_are_what_an_engine_needs_and_make_the_same_model_again(
    tuned: Checkpoint, texts: Encoded
) -> None:
    model = make_model(tuned.config, tuned.state, tokens_of(tuned).sep_id, _kind(tuned), 0).eval()
    made, ranges = quantized(model, SCHEMES["int8-static"], Storage(), texts)
    assert ranges is not None
    block = "encoder.layer.1.attention.self"
    assert {f"{block}.query.input", f"{block}.scores", f"{block}.q", f"{block}.k", f"{block}.v"} <= set(ranges)
    assert all(low <= 0 <= high for low, high in ranges.values())
    assert ranges["encoder.layer.0.output.dense.input"][0] == 0  # after a ReLU
    again = as_scheme(rounded(model, Storage()), SCHEMES["int8-static"], (), read_ranges(write_ranges(ranges))).eval()
    assert all(np.array_equal(a, b) for a, b in zip(predict(made, texts), predict(again, texts), strict=True))


def _kind(checkpoint: Checkpoint) -> Kind:
    return Classification(checkpoint.labels or ())


def test_what_is_kept_is_neither_rounded_nor_are_its_activations(tuned: Checkpoint, texts: Encoded) -> None:
    model = make_model(tuned.config, tuned.state, tokens_of(tuned).sep_id, _kind(tuned), 0).eval()
    everything = ("encoder", "embeddings", "classifier", "encoder.*", "embeddings.*")
    for name in ("int8-static", "int8-dynamic", "int8"):
        made, _ = quantized(model, SCHEMES[name], Storage(keep=everything), texts)
        assert all(np.array_equal(a, b) for a, b in zip(predict(made, texts), predict(model, texts), strict=True))
    made, ranges = quantized(model, SCHEMES["int8-static"], Storage(keep=("encoder.layer.1",)), texts)
    assert ranges is not None
    assert not any(name.startswith("encoder.layer.1.") for name in ranges)
    losses = layer_losses(model, made, texts)
    assert losses["encoder.layer.1.intermediate.dense"] == 0
    assert losses["encoder.layer.0.intermediate.dense"] > 0


def test_quantization_aware_training_sets_ranges_as_google_s_recipe_does(
    folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    quantize(
        folder, tmp_path / "out", QuantizeOptions("int8-qat", dev=tiny_folder, max_length=16, epochs=2, batch_size=8)
    )
    read = load(tmp_path / "out")
    assert (read.config.mask_style, read.config.hidden_act) == ("soft", "relu6")
    assert read.ranges is not None
    scores = [r for name, r in read.ranges.items() if name.endswith(".scores")]
    assert len(scores) == 2
    assert all(SCORE_CLIP[0] <= low and high <= SCORE_CLIP[1] for low, high in scores)
    assert max(high for name, (_, high) in read.ranges.items() if name.endswith("output.dense.input")) <= 6
    model = make_model(read.config, read.state, 0, _kind(read), 0)
    norms = [module for module in model.mobilebert.modules() if isinstance(module, NoNorm)]
    assert norms
    for norm in norms:  # gain and bias are on a grid of 8 bits
        for value in (norm.weight, norm.bias):
            assert torch.allclose(round_rows(value[None])[0], value, rtol=1e-6, atol=0)


# ---- gains that make NoNorm explode --------------------------------------------------------------------------------


def sure_of_itself(tmp_path: Path, words: list[str]) -> tuple[Checkpoint, Path]:
    """A model of random weights, and texts labelled as it labels them, without those that it hardly tells apart.

    No part of it is idle then, as much of a model is on an easy task: what is lost anywhere shows in the labels.
    """
    vocabulary = train_vocabulary(words * 5, 200)
    config = preset("nano").with_changes(vocab_size=len(vocabulary), initializer_range=0.2)
    kind = Classification(("a", "b", "c"))
    model = make_model(config, {}, vocabulary.sep_id, kind, seed=3).eval()
    random_ = np.random.default_rng(0)
    texts = [" ".join(random_.choice(words, size=6)) for _ in range(600)]
    encoded = kind.encode([Example(text, "a") for text in texts], Tokenizer(vocabulary), 16)
    logits = np.stack(predict(model, encoded))
    with torch.no_grad():
        model.classifier.bias -= torch.from_numpy(logits.mean(0))
    logits = logits - logits.mean(0)
    margin = np.sort(logits, 1)[:, -1] - np.sort(logits, 1)[:, -2]
    sure = [i for i in range(600) if margin[i] > np.median(margin)]
    said = [json.dumps({"text": texts[i], "label": "abc"[int(logits[i].argmax())]}) for i in sure]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("\n".join(said[:150]) + "\n")
    (tmp_path / "own" / "test.jsonl").write_text("\n".join(said[150:]) + "\n")
    return Checkpoint(config, state_of(model), vocabulary.tokens, ("a", "b", "c")), tmp_path / "own"


def test_activations_that_explode_are_told_by_layer_and_rescued_by_keeping_it_wide(
    tiny_dataset: Dataset, tmp_path: Path
) -> None:
    calm, data = sure_of_itself(tmp_path, sorted({word for e in tiny_dataset.train for word in e.text.split()}))
    checkpoints.save(calm, tmp_path / "calm")
    checkpoints.save(explode(calm, list(range(0, 64, 8)), 3e3), tmp_path / "wild")
    narrow = ("bottleneck.input.dense", "bottleneck.attention.dense", "attention.self.value")
    readers = {f"encoder.layer.1.{name}" for name in narrow}
    for scheme in ("int8-dynamic", "int8-static"):
        options = QuantizeOptions(scheme, dev=data, max_length=16)
        healthy = quantize(tmp_path / "calm", tmp_path / f"{scheme}-calm", options)
        assert healthy["dev"]["float"] == 100
        assert healthy["dev"]["lost"] <= 2
        report = quantize(tmp_path / "wild", tmp_path / scheme, options)
        assert report["dev"]["float"] == 100, "the same function, as long as nothing is rounded"
        assert report["dev"]["lost"] > 10
        assert set(report["worst"][:3]) == readers
        assert report["errors"][f"{report['worst'][2]}.weight"]["output"] > 0.2
        rescued = quantize(tmp_path / "wild", tmp_path / f"{scheme}-2", dataclasses.replace(options, budget=2.0))
        assert set(rescued["keep"]) >= readers
        assert rescued["dev"]["lost"] <= 2
        assert rescued["tried"][0]["keep"] == []
        assert rescued["bytes_after"] > report["bytes_after"]
        assert load(tmp_path / f"{scheme}-2").keep == tuple(rescued["keep"])


# ---- a budget ------------------------------------------------------------------------------------------------------


def test_a_budget_takes_the_smallest_scheme_within_it_or_says_that_none_is(
    folder: Path, tuned: Checkpoint, tiny_folder: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(dev=tiny_folder, max_length=16, budget=5.0)
    report = quantize(folder, tmp_path / "out", options)
    assert report["scheme"] == "int4"
    assert report["dev"]["lost"] <= 5
    # Nothing is ever read there, so float does not feel it; in each row it leaves the others no bits.
    torn = {name: value.clone() for name, value in tuned.state.items()}
    torn["embeddings.word_embeddings.weight"][:, -1] = 0
    torn["embeddings.embedding_transformation.weight"][:, 31::32] = 1e6
    checkpoints.save(dataclasses.replace(tuned, state=torn), tmp_path / "torn")
    with pytest.raises(
        QuantizationError, match=r"no scheme stays within 1 points of .*: int4 [^,]*, int4 with 1 kept .*\);"
    ):
        quantize(tmp_path / "torn", tmp_path / "none", dataclasses.replace(options, scheme="int4", budget=1.0))
    assert not (tmp_path / "none").exists()


# ---- the commands --------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `pocketfed` prints, in this process, through its own entry point."""
    from pocketfed.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pocketfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return said.out


def test_the_command_prints_bytes_errors_layers_and_what_a_task_loses(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("quantize", folder, "--dev", tiny_folder, "--max-length", 16, "--keep", "word_embeddings", "--group", 32)
    told = run(capsys, *given, "--scheme", "int4", "--out", tmp_path / "a")
    assert "int4" in told
    assert "x smaller), largest error of a weight" in told
    assert f"accuracy on {tiny_folder.name} (test, 24 examples)" in told
    assert "points lost" in told
    assert "Layers that lose most: " in told
    report = json.loads(run(capsys, *given, "--budget", 5, "--out", tmp_path / "b", "--json"))
    assert (report["scheme"], report["group"], report["keep"]) == ("int4", 32, ["word_embeddings"])
    assert [set(t) for t in report["tried"]] == [{"scheme", "keep", "bytes", "lost"}]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["quantization_group"], config["quantization_keep"]) == (32, ["word_embeddings"])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_benchmark_s_rows_are_made_once(
    folder: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(Path(__file__).resolve().parents[1] / "benchmarks" / "quantization.py")
    rows = tmp_path / "rows.jsonl"
    given = ["--model", str(folder), "--data", str(tiny_folder), "--epochs", "1", "--length", "16", "--out", str(rows)]
    for schemes, seeds, count in (("int8,int4", "0", 2), ("int8,int4", "0", 2), ("int8,int4,int8-qat", "0,1", 6)):
        monkeypatch.setattr(sys, "argv", [script, *given, "--schemes", schemes, "--seeds", seeds])
        runpy.run_path(script, run_name="__main__")
        assert len(rows.read_text().splitlines()) == count
    table = capsys.readouterr().out.splitlines()
    assert table[-4] == "| data | metric | seeds | float | int8 | int4 | int8-qat |"
    assert table[-2].startswith(f"| {tiny_folder.name} | accuracy | 2 | ")
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {(row["seed"], row["scheme"]) for row in made} == {
        (s, n) for s in (0, 1) for n in ("int8", "int4", "int8-qat")
    }
    assert all(row["lost"] == row["against"] - row["value"] for row in made)
    assert all(row["against"] == row["float"] for row in made if row["scheme"] != "int8-qat")
    with rows.open("a") as stream:  # another model's row in the same file is none of this table's
        stream.write(json.dumps(made[0] | {"key": "another", "model": "another", "seed": 9, "lost": 99.0}) + "\n")
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-4:] == table[-4:]


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantized_is_refused_in_one_sentence(
    folder: Path, tuned: Checkpoint, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text('{"text": "play some jazz", "label": "music"}\n' * 5)
    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": "cats"}\n{"text": "b", "label": "dogs"}\n' * 5)
    (tmp_path / "scores.tsv").write_text("text\tscore\n" + "".join(f"play {i}\t{i}\n" for i in range(9)))
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    quantize(folder, tmp_path / "int8", QuantizeOptions())
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (folder, {"scheme": "int3"}, "no quantization scheme 'int3'; choose one of int4, int8-static"),
        (folder, {"scheme": "int8-static"}, "int8-static needs texts to fix ranges by; give --calibrate DATA"),
        (folder, {"scheme": "int8-static", "calibrate": tmp_path / "empty.jsonl"}, "empty.jsonl is empty.*calibration"),
        (folder, {"scheme": "int8-static", "calibrate": tmp_path / "one.jsonl"}, "one.jsonl holds texts of the one label 'music'"),
        (folder, {"scheme": "int8-static", "calibrate": tmp_path / "gone"}, "gone"),
        (folder, {"scheme": "int8-qat"}, "int8-qat trains on a task; give its data with --dev DATA"),
        (folder, {"budget": 0.5}, "a budget of 0.5 points needs data to measure on; give --dev DATA"),
        (folder, {"budget": float("nan"), "dev": tiny_folder}, "a budget of nan points is none"),
        (folder, {"keep": ("encoder.layer.7",)}, r"no layer 'encoder.layer.7' to keep; name one .* such as encoder\.layer"),
        (folder, {"dev": tmp_path / "other.jsonl"}, "tells apart alarm, .* has the label 'cats'"),
        (folder, {"dev": tmp_path / "scores.tsv"}, r"head has 4 outputs and scores \(regression\) asks for 1"),
        (tmp_path / "int8", {"scheme": "int4"}, r"is quantized already \(int8\), and rounding twice loses twice"),
        (tmp_path / "artifact", {}, "artifact is a published artifact"),
        (tmp_path / "bert", {}, "describes a 'bert'; only mobilebert can be read"),
    ]  # fmt: skip
    for model, changes, says in cases:
        with pytest.raises(ValueError, match=says) as refused:
            quantize(model, tmp_path / "out", QuantizeOptions(**changes))
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "out").exists()


def test_weights_and_activations_that_are_not_finite_are_named(
    tuned: Checkpoint, texts: Encoded, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoints.save(tuned, tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    held["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(held, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.output\.dense\.weight holds a value that is NaN"):
        quantize(tmp_path / "model", tmp_path / "out", QuantizeOptions("int4"))
    state = dict(tuned.state)
    state["encoder.layer.0.intermediate.dense.weight"] = 1e38 * torch.ones(64, 32)
    model = make_model(tuned.config, state, tokens_of(tuned).sep_id, _kind(tuned), 0).eval()
    with pytest.raises(QuantizationError, match=r"what encoder\.layer\.\S+ reads is NaN or infinite; train"):
        quantized(model, SCHEMES["int8-static"], Storage(), texts)
    with pytest.raises(QuantizationError, match="no text to calibrate on"):
        calibrate(
            as_scheme(model, SCHEMES["int8-static"]), Encoded((), texts.ids[:0], texts.starts[:1], texts.targets[:0])
        )


def test_texts_without_labels_calibrate_and_pairs_stay_pairs(tuned: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("play some jazz\nwake me at six\n")
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tlabel\nplay\tjazz\t0\nwake me\tat six\t1\n")
    tokenizer = Tokenizer(tokens_of(tuned))
    assert len(read_calibration(tmp_path / "texts.txt", tokenizer, 16)) == 2
    pairs = read_calibration(tmp_path / "pairs.tsv", tokenizer, 16)
    separator = tokens_of(tuned).sep_id
    assert [int((pairs.take([i])[0] == separator).sum()) for i in range(2)] == [2, 2]


def test_ranges_that_are_none_are_refused() -> None:
    for text in (
        "[]",
        '{"a": [1]}',
        '{"a": [1.0, 2.0]}',
        '{"a": [0, Infinity]}',
        "no",
        f'{{"a": [0, 1{400 * "0"}]}}',
        b"\xff",
    ):
        with pytest.raises(QuantizationError, match=r"ranges\.json"):
            read_ranges(text)


def test_sites_are_where_products_read_and_nowhere_else(tuned: Checkpoint) -> None:
    model = make_model(tuned.config, tuned.state, tokens_of(tuned).sep_id, _kind(tuned), 0)
    made = as_scheme(model, SCHEMES["int8-static"])
    linear = sum(type(m) is torch.nn.Linear for m in model.mobilebert.modules())
    assert len(dict(sites(made.mobilebert))) == linear + 4 * tuned.config.num_hidden_layers
    assert type(made.classifier) is torch.nn.Linear


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_what_is_kept_float32_is_so_in_a_published_artifact_too(
    folder: Path, tiny_folder: Path, tmp_path: Path, activations: str
) -> None:
    from pocketfed.client_sdk.artifacts import open_artifact
    from pocketfed.client_sdk.plan_trainer import PlanTrainer
    from pocketfed.client_sdk.torch_trainer import load_student
    from pocketfed.coordinator.artifacts import build_artifact

    layer = "encoder.layer.1.attention.self.value"
    quantize(folder, tmp_path / "kept", QuantizeOptions(keep=(layer,)))
    read = load(tmp_path / "kept")
    built = build_artifact(
        tmp_path / "artifact", config=read.config, state=read.state, vocabulary=tokens_of(read), labels=read.labels or (),
        trainable_sets=("head",), quantized=True, activations=activations, keep=read.kept_float, max_length=16,
    )  # fmt: skip
    assert built.manifest["keep"] == [layer]
    held = {
        t.name
        for t in onnx.load(str(tmp_path / "artifact" / "predict-head.onnx"), load_external_data=False).graph.initializer
    }
    stem = f"mobilebert.{layer}.weight"
    assert stem in held
    assert f"{stem}.int8" not in held
    assert f"{stem.replace('value', 'query')}.int8" in held
    artifact = open_artifact(built.folder, built.version)
    trainer, student = PlanTrainer(artifact, "head"), load_student(artifact, "head").eval()
    rows = trainer.encode(["play some jazz", "wake me at noon"], None, 16)
    ids = torch.from_numpy(np.stack([np.pad(row, (0, 16 - len(row))) for row in rows]))
    mask = (ids != 0).to(torch.int64)
    with torch.no_grad():
        student.classifier.load_state_dict({n: read.state[f"classifier.{n}"] for n in ("weight", "bias")})
        wanted = student(ids, mask).numpy()
    assert np.allclose(trainer.logits(trainer.initial_theta(), ids.numpy(), mask.numpy()), wanted, atol=1e-4)
