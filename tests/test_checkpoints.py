"""Model folders: written whole, read strictly, and Hugging Face's read too."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketfed.model.checkpoints import Checkpoint, CheckpointError, load, load_student, save
from pocketfed.model.config import MobileBertConfig
from pocketfed.model.mobilebert import MobileBert
from pocketfed.model.quantization import dequantize_state, quantize_state

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "some", "##thing", "stop", "it")
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
IDS = torch.tensor([[2, 5, 6, 7, 3]])


def small(labels: tuple[str, ...] | None = None) -> Checkpoint:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = dict(MobileBert(CONFIG.with_changes(initializer_range=0.2)).state_dict())
        if labels:
            state |= {"classifier.weight": torch.randn(len(labels), 16), "classifier.bias": torch.randn(len(labels))}
    return Checkpoint(CONFIG, state, WORDS, labels)


@pytest.mark.parametrize("labels", [None, ("music", "alarm", "weather")])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    checkpoint = small(labels)
    save(checkpoint, tmp_path / "model", card="# card\n")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}  # nothing half-written beside it
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"
    read = load(tmp_path / "model")
    assert (read.config, read.vocabulary, read.labels, read.quantization) == (CONFIG, WORDS, labels, None)
    assert set(read.state) == set(checkpoint.state)
    assert all(torch.equal(read.state[name], value) for name, value in checkpoint.state.items())


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(small(("x", "y")), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_case_of_the_vocabulary_survives(tmp_path: Path) -> None:
    save(dataclasses.replace(small(), lower_case=False), tmp_path / "model")
    assert load(tmp_path / "model").lower_case is False


def test_int8_comes_back_as_float32_and_saves_to_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(small(("x", "y")), quantization="int8")
    save(checkpoint, tmp_path / "model")
    read = load(tmp_path / "model")
    expected = dequantize_state(quantize_state(checkpoint.state)[0])
    assert read.quantization == "int8"
    assert all(value.dtype == torch.float32 for value in read.state.values())
    assert all(torch.equal(read.state[name], value) for name, value in expected.items())
    save(read, tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "model" / weights).read_bytes()


def test_a_loaded_student_computes_what_the_saved_one_did_and_shares_no_memory(tmp_path: Path) -> None:
    checkpoint = small(("x", "y"))
    model = MobileBert(CONFIG).eval()
    model.load_state_dict({k: v for k, v in checkpoint.state.items() if not k.startswith("classifier.")})
    save(checkpoint, tmp_path / "model")
    read = load(tmp_path / "model")
    student = load_student(read)
    assert not student.training
    assert torch.equal(student(IDS, torch.ones_like(IDS)).last, model(IDS, torch.ones_like(IDS)).last)
    with torch.no_grad():
        student.embeddings.LayerNorm.bias.add_(1.0)
    assert torch.equal(read.state["embeddings.LayerNorm.bias"], torch.zeros(16))


def test_a_model_folder_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    save(small(("x", "y")), tmp_path / "model", card="old")
    save(small(), tmp_path / "model")
    assert load(tmp_path / "model").labels is None
    assert not (tmp_path / "model" / "README.md").exists()

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds chapter1\.txt and is not a model folder"):
        save(small(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"

    (tmp_path / "model" / "notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        save(small(), tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        save(small(), tmp_path / "file")


def test_a_disk_that_is_full_leaves_the_model_before(tmp_path: Path) -> None:
    save(small(), tmp_path / "model", card="# the first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # no file may grow beyond that
    try:
        with pytest.raises(CheckpointError, match=r"model cannot be written: .*free some space"):
            save(small(("x", "y")), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "README.md").read_text() == "# the first\n"
    assert load(tmp_path / "model").labels is None


def test_weights_that_are_not_finite_are_neither_held_nor_saved(tmp_path: Path) -> None:
    checkpoint = small()
    bad = {**checkpoint.state, "embeddings.LayerNorm.bias": torch.full((16,), torch.nan)}
    with pytest.raises(CheckpointError, match=r"embeddings\.LayerNorm\.bias holds a value that is NaN"):
        dataclasses.replace(checkpoint, state=bad)


# ---- bad folders ---------------------------------------------------------------------------------------------------


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no readable config\.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds no object"),
    "another model": (_edit_config(model_type="bert"), "describes a 'bert'"),
    "bad config": (_edit_config(hidden_size=-1), "hidden_size is -1"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "a pickle": (_pickle_instead, r"pytorch_model\.bin, a pickle.*convert it to model\.safetensors"),
    "truncated": (_truncate, r"model\.safetensors is damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
    "other widths": (_edit_config(hidden_size=32), r"word_embeddings|embeddings\.\w+.*\(16, 16\).*asks for \(16, 32\)"),
    "tensor missing": (
        _edit_tensors(lambda t: t.pop("encoder.layer.1.output.dense.bias")),
        r"encoder\.layer\.1\.output\.dense\.bias, which the config asks for, is missing",
    ),
    "tensor too many": (_edit_tensors(lambda t: t.update(surprise=torch.ones(1))), "surprise has no place"),
    "integers": (
        _edit_tensors(lambda t: t.update({"embeddings.LayerNorm.bias": torch.zeros(16, dtype=torch.int64)})),
        r"embeddings\.LayerNorm\.bias holds int64",
    ),
    "not finite": (
        _edit_tensors(lambda t: t["embeddings.LayerNorm.bias"].fill_(torch.inf)),
        r"embeddings\.LayerNorm\.bias holds a value that is NaN or infinite",
    ),
    "int8 without scale": (
        _edit_tensors(lambda t: t.update({"encoder.layer.0.output.dense.weight": torch.ones(8, 12, dtype=torch.int8)})),
        r"encoder\.layer\.0\.output\.dense\.weight\.scale is missing",
    ),
    "no vocabulary": (lambda f: (f / "vocab.txt").unlink(), "no vocabulary"),
    "short vocabulary": (
        lambda f: (f / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n"),
        "the vocabulary has 9 tokens and the config's vocab_size is 10",
    ),
    "vocabulary without [MASK]": (
        lambda f: (f / "vocab.txt").write_text("\n".join(w.replace("[MASK]", "mask") for w in WORDS)),
        "MASK",
    ),
    "labels of another head": (_edit_config(labels=["only one"]), r"classifier\.weight has shape \(2, 16\).*\(1, 16\)"),
    "labels no list": (_edit_config(labels="x"), "labels are 'x'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence_that_names_what_is_wrong(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    save(small(("x", "y")), folder)
    load(folder)
    damage, said = BROKEN[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(CheckpointError, match="no model folder nowhere"):
        load(Path("nowhere"))


# ---- Hugging Face --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MobileBertForPreTraining", "MobileBertForSequenceClassification"])
@pytest.mark.parametrize("sizes", [{}, {"use_bottleneck_attention": True}])
def test_a_folder_saved_by_hugging_face_gives_the_same_hidden_states(
    tmp_path: Path, kind: str, sizes: dict[str, bool]
) -> None:
    import transformers

    config = transformers.MobileBertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        intra_bottleneck_size=8,
        embedding_size=4,
        num_feedforward_networks=2,
        initializer_range=0.2,
        attn_implementation="eager",
        num_labels=2,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(WORDS) + "\n")

    checkpoint = load(tmp_path / "hf")
    student = load_student(checkpoint)
    with torch.no_grad():
        ours = student(IDS, torch.ones_like(IDS))
        expected = theirs.mobilebert(input_ids=IDS)
    torch.testing.assert_close(ours.last, expected.last_hidden_state, rtol=1e-5, atol=1e-6)
    pooled = student.pool(ours.last, torch.ones_like(IDS))
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=1e-5, atol=1e-6)
    if kind == "MobileBertForSequenceClassification":
        assert checkpoint.labels == ("no", "yes")
        assert torch.equal(checkpoint.state["classifier.weight"], theirs.classifier.weight)
    else:
        assert not [name for name in checkpoint.state if name.startswith("cls.")]
    save(checkpoint, tmp_path / "ours")
    assert load(tmp_path / "ours").config == checkpoint.config


def test_a_tokenizer_json_serves_as_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers

    save(small(), tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").unlink()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    assert load(tmp_path / "model").vocabulary == WORDS
