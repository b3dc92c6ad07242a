"""Folders for `transformers`: it loads them, computes the same, and what it cannot express is refused or said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from pocketfed.model.checkpoints import Checkpoint, CheckpointError, load, load_folder, load_student, save
from pocketfed.model.config import BASELINES, TEACHERS, MobileBertConfig
from pocketfed.model.heads import TextClassifier
from pocketfed.model.huggingface_export import export_huggingface
from pocketfed.model.mobilebert import MobileBert
from pocketfed.model.quantization import quantize_state
from pocketfed.model.teacher import PreTrainingModel, save_pretrained
from pocketfed.model.tokenization import SPECIAL_TOKENS, Tokenizer, Vocabulary

WORDS = (*SPECIAL_TOKENS, "play", "some", "##thing", "stop", "it", ",", "jazz")
VOCABULARY = Vocabulary(WORDS)
CONFIG = MobileBertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    intra_bottleneck_size=8,
    embedding_size=4,
    num_feedforward_networks=2,
    max_position_embeddings=16,
    initializer_range=0.3,
)
TEXTS, SECONDS = ["Play something", "stop it"], ["jazz, something", "it"]


@pytest.fixture(autouse=True)
def _drawn() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def drawn(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms and biases too, so that none can be left out unnoticed."""
    return {name: value + 0.2 * torch.randn_like(value) for name, value in state.items()}


def student(config: MobileBertConfig = CONFIG, labels: tuple[str, ...] = ()) -> Checkpoint:
    state = dict(MobileBert(config).state_dict())
    if labels:
        state |= {"classifier.weight": torch.zeros(len(labels), 16), "classifier.bias": torch.zeros(len(labels))}
    return Checkpoint(config, drawn(state), WORDS, labels or None)


def batch() -> dict[str, Tensor]:
    """Two pairs of texts, the second padded."""
    ids, mask = (torch.from_numpy(x) for x in Tokenizer(VOCABULARY).encode(TEXTS, SECONDS))
    types = (torch.cumsum((ids == 3).long(), 1) - (ids == 3).long() > 0).long() * mask
    assert mask[1].sum() < mask.shape[1]
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def theirs(folder: Path) -> Any:
    """The class its `config.json` names, with every weight from the file."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.double().eval()


def same(ours: Tensor, expected: Tensor, rows: Tensor) -> None:
    assert float(expected[rows].std()) > 1e-3
    torch.testing.assert_close(ours[rows], expected[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False},
        {"classifier_activation": True},
        {"hidden_act": "gelu_tanh", "normalization_type": "layer_norm", "layer_norm_eps": 1e-5},
        {"pooling": "mean", "head_norm": True},
    ],
)
def test_transformers_loads_a_student_and_computes_its_hidden_states_padding_or_not(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    checkpoint = student(CONFIG.with_changes(**changes))
    save(checkpoint, tmp_path / "student")
    made = export_huggingface(tmp_path / "student", tmp_path / "hf")
    assert made.architecture == "MobileBertModel"
    model, given = load_student(checkpoint).double(), batch()
    with torch.no_grad():
        hidden = theirs(tmp_path / "hf")(**given)
        last = model(given["input_ids"], given["attention_mask"], given["token_type_ids"]).last
    same(last, hidden.last_hidden_state, given["attention_mask"].bool())
    if checkpoint.config.classifier_activation:
        torch.testing.assert_close(model.pool(last, given["attention_mask"]), hidden.pooler_output)
    assert any("pooling" in note for note in made.notes) == ("pooling" in changes)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("classification", ("no", "yes", "perhaps")),
        ("regression", ("score",)),
        ("tokens", ("O", "B", "I")),
        ("spans", ("start", "end")),
    ],
)
def test_every_head_gives_the_logits_it_gave(tmp_path: Path, task: str, labels: tuple[str, ...]) -> None:
    checkpoint = student(labels=labels)
    save(checkpoint, tmp_path / "fine-tuned")
    export_huggingface(tmp_path / "fine-tuned", tmp_path / "hf", "" if task in ("classification", "spans") else task)
    ours = TextClassifier(CONFIG, len(labels), VOCABULARY.sep_id, task)
    ours.mobilebert.load_state_dict({n: v for n, v in checkpoint.state.items() if not n.startswith("classifier.")})
    ours.classifier.load_state_dict(
        {n.removeprefix("classifier."): v for n, v in checkpoint.state.items() if n.startswith("classifier.")}
    )
    given, expected = batch(), theirs(tmp_path / "hf")
    with torch.no_grad():
        logits = ours.double().eval()(given["input_ids"], given["attention_mask"])
        out = expected(**given)
    mask = given["attention_mask"].bool()
    if task == "spans":
        same(logits, torch.stack([out.start_logits, out.end_logits], -1), mask)
    else:
        same(logits, out.logits, mask if task == "tokens" else slice(None))  # type: ignore[arg-type]
        assert list(expected.config.id2label.values()) == list(labels)
    back = load(tmp_path / "hf")
    assert (back.config, back.labels) == (checkpoint.config, labels)
    assert torch.equal(back.state["classifier.weight"], checkpoint.state["classifier.weight"])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pre_training_heads_go_along_and_predict_the_same_words_and_pairs(tmp_path: Path, pooling: str) -> None:
    config = CONFIG.with_changes(pooling=pooling, isolate_padding=False)
    ours = PreTrainingModel(config)
    ours.load_state_dict(drawn(ours.state_dict()))
    save_pretrained(ours, VOCABULARY, tmp_path / "kept")
    made = export_huggingface(tmp_path / "kept", tmp_path / "hf")
    assert made.architecture == ("MobileBertForPreTraining" if pooling == "cls" else "MobileBertForMaskedLM")
    given, expected = batch(), theirs(tmp_path / "hf")
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        words, pairs = ours.double().eval()(given["input_ids"], given["attention_mask"], mask, given["token_type_ids"])
        out = expected(**given)
    if pooling == "cls":
        same(words, out.prediction_logits[mask], torch.ones(len(words), dtype=torch.bool))
        torch.testing.assert_close(pairs, out.seq_relationship_logits, rtol=1e-9, atol=1e-9)
        _, tensors, _ = load_folder(tmp_path / "hf")
        assert all(torch.equal(tensors[name], value.float()) for name, value in ours.state_dict().items())
    else:
        same(words, out.logits[mask], torch.ones(len(words), dtype=torch.bool))
        assert any("the next-sentence head is left out" in note for note in made.notes)


def test_a_folder_read_back_is_the_same_to_the_last_bit_and_so_is_its_next_export(tmp_path: Path) -> None:
    checkpoint = student()
    checkpoint.state["embeddings.word_embeddings.weight"][0] = 0.0  # what the model never reads is written as zeros
    save(checkpoint, tmp_path / "student")
    export_huggingface(tmp_path / "student", tmp_path / "hf")
    back = load(tmp_path / "hf")
    assert (back.config, back.vocabulary, back.labels) == (checkpoint.config, checkpoint.vocabulary, None)
    assert set(back.state) == set(checkpoint.state)
    assert all(torch.equal(back.state[name], value) for name, value in checkpoint.state.items())
    export_huggingface(tmp_path / "hf", tmp_path / "again")
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_folder_of_hugging_faces_own_comes_out_with_the_same_tensors(tmp_path: Path) -> None:
    import transformers

    sizes = {
        k: v for k, v in CONFIG.to_dict().items() if k not in ("pooling", "head_norm", "mask_style", "isolate_padding")
    }
    model = transformers.MobileBertForQuestionAnswering(transformers.MobileBertConfig(**sizes))
    with torch.no_grad():
        model.mobilebert.embeddings.word_embeddings.weight[0] = 0.0
    model.save_pretrained(tmp_path / "hf")
    VOCABULARY.save(tmp_path / "hf" / "vocab.txt")
    export_huggingface(tmp_path / "hf", tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert set(before) == set(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_tokenizer_goes_along_and_gives_the_same_ids(tmp_path: Path) -> None:
    import transformers

    save(student(), tmp_path / "student")
    export_huggingface(tmp_path / "student", tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    got = tokenizer(TEXTS, SECONDS, padding=True, return_tensors="pt")
    for name, value in batch().items():
        assert torch.equal(got[name], value), name
    assert tokenizer.model_max_length == 16
    assert load(tmp_path / "hf").lower_case


def test_padding_changes_nothing_there_though_it_did_with_the_embedding_it_was_trained_with(tmp_path: Path) -> None:
    checkpoint = student()
    checkpoint.state["embeddings.word_embeddings.weight"][0] = 5.0
    save(checkpoint, tmp_path / "student")
    made = export_huggingface(tmp_path / "student", tmp_path / "hf")
    assert any("written as zeros" in note for note in made.notes)
    model = theirs(tmp_path / "hf")
    given = batch()
    count = int(given["attention_mask"][1].sum())
    with torch.no_grad():
        padded = model(**given).last_hidden_state[1, :count]
        alone = model(**{name: value[1:, :count] for name, value in given.items()}).last_hidden_state[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


def test_eight_bit_weights_are_written_as_what_they_stand_for(tmp_path: Path) -> None:
    checkpoint = student()
    save(Checkpoint(CONFIG, checkpoint.state, WORDS, quantization="int8"), tmp_path / "small")
    made = export_huggingface(tmp_path / "small", tmp_path / "hf")
    assert "int8 weights are written as the float32 they stand for" in made.notes
    stored, _ = quantize_state(checkpoint.state)
    name = "encoder.layer.0.attention.self.value.weight"
    expected = stored[name].float() * stored[name + ".scale"].unsqueeze(1)
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["mobilebert." + name], expected)


@pytest.mark.parametrize(
    ("config", "labels", "said"),
    [
        (BASELINES["bert-base"], (), "use_bottleneck is false; .* so save plain BERT as BERT"),
        (TEACHERS["nano"], (), "queries and keys read 64 numbers and Hugging Face's MobileBERT gives them 128"),
        (CONFIG.with_changes(pooling="mean"), ("no", "yes"), "trained with pooling 'mean'; .* has none but 'cls'"),
        (CONFIG.with_changes(head_norm=True), ("no", "yes"), "trained with head_norm True; .* none but False"),
    ],
)
def test_what_their_classes_cannot_express_is_refused_in_one_sentence(
    tmp_path: Path, config: MobileBertConfig, labels: tuple[str, ...], said: str
) -> None:
    if config.hidden_size != 16:
        config = config.with_changes(vocab_size=len(WORDS), num_hidden_layers=1, max_position_embeddings=16)
    save(student(config, labels), tmp_path / "model")
    with pytest.raises(CheckpointError, match=said) as refusal:
        export_huggingface(tmp_path / "model", tmp_path / "hf")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "hf").exists()


def test_a_pickle_a_stranger_in_the_way_and_an_unknown_task_are_refused(tmp_path: Path) -> None:
    save(student(), tmp_path / "model")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"holds letters\.txt and is not a model folder"):
        export_huggingface(tmp_path / "model", tmp_path / "taken")
    with pytest.raises(CheckpointError, match="no task 'poetry'; choose one of classification"):
        export_huggingface(tmp_path / "model", tmp_path / "hf", "poetry")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        export_huggingface(tmp_path / "model", tmp_path / "hf")


def test_the_command_says_what_it_wrote_and_what_to_know(tmp_path: Path) -> None:
    from pocketfed.cli.commands import app

    save(student(CONFIG.with_changes(pooling="mean")), tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--to", "huggingface", "--out", str(tmp_path / "hf")]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "MobileBertModel" in shown.output
    assert "Note: a classifier put on it there reads [CLS]" in " ".join(shown.output.split())
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert told["architecture"] == "MobileBertModel"
    assert len(told["notes"]) == 2
