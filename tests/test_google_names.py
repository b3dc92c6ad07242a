"""TF1's variables and our tensors: the same things under two names, and folders with the former are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pocketfed.cli.model import export
from pocketfed.model.checkpoints import Checkpoint, CheckpointError, load, load_folder, save
from pocketfed.model.config import STUDENTS, TEACHERS, MobileBertConfig
from pocketfed.model.google_export import export_google
from pocketfed.model.google_names import from_google, is_google, tensors_from_google, tensors_to_google, to_google
from pocketfed.model.mobilebert import MobileBert
from pocketfed.model.teacher import PreTrainingModel, load_pretrained, save_pretrained
from pocketfed.model.tokenization import SPECIAL_TOKENS, Vocabulary

GRAPH = Path(__file__).resolve().parents[2] / "shared" / "reference" / "bert_encoder_unrolled_fake_weights.mlir"
WORDS = (*SPECIAL_TOKENS, "play", "##s", "it")
CONFIG = MobileBertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=12,
    intra_bottleneck_size=8,
    embedding_size=4,
    num_feedforward_networks=2,
    max_position_embeddings=16,
)


def small(config: MobileBertConfig) -> MobileBertConfig:
    return config.with_changes(vocab_size=len(WORDS), num_hidden_layers=2, max_position_embeddings=16)


@pytest.mark.parametrize(
    ("google", "ours", "transposed"),
    [
        ("bert/embeddings/word_embeddings", "mobilebert.embeddings.word_embeddings.weight", False),
        ("bert/embeddings/FakeLayerNorm/beta", "mobilebert.embeddings.LayerNorm.bias", False),
        (
            "bert/embeddings/embedding_transformation/kernel",
            "mobilebert.embeddings.embedding_transformation.weight",
            True,
        ),
        (
            "bert/encoder/layer_23/attention/self/query/kernel",
            "mobilebert.encoder.layer.23.attention.self.query.weight",
            True,
        ),
        (
            "bert/encoder/layer_0/bottleneck/attention/FakeLayerNorm/gamma",
            "mobilebert.encoder.layer.0.bottleneck.attention.LayerNorm.weight",
            False,
        ),
        (
            "bert/encoder/layer_7/ffn_layer_2/intermediate/dense/kernel",
            "mobilebert.encoder.layer.7.ffn.2.intermediate.dense.weight",
            True,
        ),
        ("cls/predictions/transform/LayerNorm/gamma", "cls.predictions.transform.LayerNorm.weight", False),
        ("cls/predictions/extra_output_weights", "cls.predictions.dense.weight", True),
        ("cls/seq_relationship/output_weights", "cls.seq_relationship.weight", False),
        ("cls/squad/output_weights", "qa_outputs.weight", False),
        ("output_bias", "classifier.bias", False),
    ],
)
def test_a_variable_has_this_name_here(google: str, ours: str, transposed: bool) -> None:
    assert from_google(google) == (ours, transposed)
    assert to_google(ours, MobileBertConfig()) == (google, transposed)


def test_every_variable_of_googles_graph_has_a_place_in_ours_and_goes_back_to_its_name() -> None:
    if not GRAPH.is_file():
        pytest.skip(f"the StableHLO reference is not there ({GRAPH.name})")
    found = re.findall(r'@"__iree_flow_([^"]+)"[^=]*= dense<[^>]+> : tensor<([\dx]+)xf32>', GRAPH.read_text())
    assert len(found) == 1113
    with torch.device("meta"):
        model = MobileBert(MobileBertConfig())
    shapes = {f"mobilebert.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    shapes |= {"qa_outputs.weight": (2, 512), "qa_outputs.bias": (2,)}
    for google, size in found:
        place = from_google(google)
        assert place is not None
        name, transposed = place
        shape = shapes.pop(name)
        assert (shape[::-1] if transposed else shape) == tuple(int(n) for n in size.split("x")), google
        assert to_google(name, MobileBertConfig()) == (google, transposed)
    assert not shapes


@pytest.mark.parametrize("config", [*STUDENTS.values(), *TEACHERS.values()])
def test_every_preset_with_its_pre_training_heads_goes_there_and_back(config: MobileBertConfig) -> None:
    state = PreTrainingModel(small(config)).state_dict()
    variables = tensors_to_google(state, config)
    assert len(variables) == len(state)
    assert is_google(variables)
    back = tensors_from_google(variables)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    norms = {name.split("/")[-2] for name in variables if name.endswith("gamma") and name.startswith("bert/")}
    assert norms == {"FakeLayerNorm" if config.normalization_type == "no_norm" else "LayerNorm"}


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_a_folder_of_tf1_variables_is_read_as_the_model_it_is(tmp_path: Path, form: str) -> None:
    model = PreTrainingModel(CONFIG.with_changes(initializer_range=0.3))
    variables = tensors_to_google(model.state_dict(), CONFIG)
    variables |= {"global_step": torch.tensor(7), "bert/embeddings/word_embeddings/adam_m": torch.zeros(8, 4)}
    if form == "npz":
        np.savez(tmp_path / "model.npz", **{name: value.numpy() for name, value in variables.items()})
    else:
        save_file(variables, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    Vocabulary(WORDS).save(tmp_path / "vocab.txt")

    student = load(tmp_path)
    assert student.config == CONFIG
    assert all(torch.equal(student.state[n], v) for n, v in model.mobilebert.state_dict().items())
    trained, vocabulary = load_pretrained(tmp_path)
    assert vocabulary.tokens == WORDS
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in trained.state_dict().items())
    save(student, tmp_path.parent / "ours")
    assert load(tmp_path.parent / "ours").state.keys() == student.state.keys()


@pytest.mark.parametrize("head", ["none", "classifier", "spans", "pre-training"])
def test_an_exported_model_has_googles_names_and_is_read_back_as_it_was(
    tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = CONFIG.with_changes(mask_style="soft", isolate_padding=False, normalization_type="layer_norm")
    config = config.with_changes(hidden_act="gelu_tanh", initializer_range=0.3)
    model, labels = PreTrainingModel(config), None
    state = {name: value.detach() for name, value in model.mobilebert.state_dict().items()}
    if head == "pre-training":
        save_pretrained(model, Vocabulary(WORDS), tmp_path / "model")
    else:
        if head != "none":
            labels = ("start", "end") if head == "spans" else ("a", "b")
            state |= {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
        save(Checkpoint(config, state, WORDS, labels), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "tf1", to="tf1")
    assert "Note" not in capsys.readouterr().out  # Google's own mask, gelu and pooling

    with np.load(tmp_path / "tf1" / "model.npz") as held:
        variables = {name: held[name] for name in held.files}
    kernel = variables["bert/encoder/layer_1/ffn_layer_0/intermediate/dense/kernel"]
    assert np.array_equal(kernel.T, state["encoder.layer.1.ffn.0.intermediate.dense.weight"].numpy())
    name = {"classifier": "output_weights", "spans": "cls/squad/output_weights"}.get(head)
    assert name is None or np.array_equal(variables[name], state["classifier.weight"].numpy())
    assert json.loads((tmp_path / "tf1" / "config.json").read_text())["hidden_act"] == "gelu"
    again = load(tmp_path / "tf1")
    assert (again.config, again.labels, again.vocabulary) == (config, labels, WORDS)
    assert all(torch.equal(again.state[n], value) for n, value in state.items())
    if head == "pre-training":
        whole, _ = load_pretrained(tmp_path / "tf1")
        assert all(torch.equal(value, model.state_dict()[n]) for n, value in whole.state_dict().items())


def test_an_exported_model_says_what_googles_code_computes_otherwise(tmp_path: Path) -> None:
    save(Checkpoint(CONFIG, MobileBert(CONFIG).state_dict(), WORDS), tmp_path / "hard")
    assert export_google(tmp_path / "hard", tmp_path / "one").notes == (
        "padding is masked softly there, so padded texts come out a little otherwise",
    )
    other = CONFIG.with_changes(hidden_act="gelu", mask_style="soft", isolate_padding=False, pooling="mean")
    save(Checkpoint(other, MobileBert(other).state_dict(), WORDS), tmp_path / "gelu")
    assert [note.split()[0] for note in export_google(tmp_path / "gelu", tmp_path / "two").notes] == ["its", "heads"]


def test_gelu_means_its_tanh_form_beside_tf1_variables(tmp_path: Path) -> None:
    config = CONFIG.with_changes(hidden_act="gelu", normalization_type="layer_norm")
    save_file(tensors_to_google(MobileBert(config).state_dict(), config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    Vocabulary(WORDS).save(tmp_path / "vocab.txt")
    assert load(tmp_path).config.hidden_act == "gelu_tanh"
    assert load_folder(tmp_path)[0].hidden_act == "gelu_tanh"


def test_a_variable_of_another_model_and_a_pickled_array_are_refused(tmp_path: Path) -> None:
    variables = tensors_to_google(MobileBert(CONFIG).state_dict(), CONFIG)
    save_file({**variables, "bert/adapter/scale": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    Vocabulary(WORDS).save(tmp_path / "vocab.txt")
    with pytest.raises(CheckpointError, match="bert/adapter/scale is no variable of a MobileBERT"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    np.savez(tmp_path / "model.npz", weights=np.array([{"any": "code"}], dtype=object))
    with pytest.raises(CheckpointError, match=r"model\.npz is damaged"):
        load(tmp_path)
