"""The student that comes with the package: small enough to ship, and worth starting from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from pocketfed.coordinator import pipeline
from pocketfed.model.checkpoints import load, load_student, tokens_of
from pocketfed.model.config import STUDENTS
from pocketfed.model.shipped import FOLDER, SHIPPED, located, starts_untrained
from pocketfed.model.tokenization import Tokenizer

ROOT = Path(__file__).parents[1]


def vectors(texts: list[str]) -> torch.Tensor:
    """Each text's mean over tokens, of length 1."""
    checkpoint = load(FOLDER)
    model, tokenizer = load_student(checkpoint), Tokenizer(tokens_of(checkpoint))
    rows = []
    with torch.no_grad():
        for text in texts:
            words = tokenizer.encode_plain([text])[0]
            ids = torch.tensor([[tokenizer.vocabulary.cls_id, *words, tokenizer.vocabulary.sep_id]])
            mask = torch.ones_like(ids)
            rows.append(model.pool(model(ids, mask).last, mask)[0])
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def test_it_is_eight_bits_of_the_preset_and_takes_less_than_eight_megabytes() -> None:
    checkpoint = load(FOLDER)
    assert checkpoint.quantization == "int8"
    assert checkpoint.config == STUDENTS["pocket"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6


def test_its_card_says_whose_student_it_is_and_under_which_licence() -> None:
    card = (FOLDER / "README.md").read_text()
    assert "all-MiniLM-L6-v2" in card
    assert "Licence: Apache-2.0" in card
    assert "sha256" in card


def test_it_is_in_the_wheel() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    found = {path for pattern in patterns for path in (ROOT / "model").glob(pattern)}
    assert set(FOLDER.iterdir()) <= found


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("will it rain tomorrow", "what is the weather forecast", "put on some jazz"),
        ("i lost my credit card", "someone stole my visa", "book a table for two"),
        ("a wonderful, moving film", "an excellent movie", "a dull and boring picture of nothing"),
        ("how do i get to the station", "directions to the train stop", "how do i change my password"),
    ],
)
def test_texts_that_mean_the_same_are_near_though_they_share_no_word(text: str, near: str, far: str) -> None:
    one, same, other = vectors([text, near, far])
    assert float(one @ same) > float(one @ other) + 0.05


def test_its_name_stands_for_its_folder_unless_there_is_one_of_that_name_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert located(SHIPPED) == FOLDER
    assert load(Path(SHIPPED)).config == STUDENTS["pocket"]
    assert pipeline.inspect(SHIPPED)["quantization"] == "int8"
    assert not starts_untrained(SHIPPED)
    Path(SHIPPED).mkdir()
    assert located(SHIPPED) == Path(SHIPPED)


def test_it_is_quantized_again_to_the_same_weights_and_keeps_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = pipeline.quantize(Path(SHIPPED), tmp_path / "again")
    assert report["bytes_before"] == (FOLDER / "model.safetensors").stat().st_size
    state, again = load(FOLDER).state, load(tmp_path / "again").state
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert "Apache-2.0" in (tmp_path / "again" / "README.md").read_text()


def test_presets_start_untrained_and_so_does_a_name_that_is_nothing(tmp_path: Path) -> None:
    assert starts_untrained("nano")
    assert starts_untrained("nanoo")  # the preset's own message is the better one
    assert not starts_untrained(str(tmp_path))
