"""The student that comes with the package, and what a model given by name stands for."""

from __future__ import annotations

from pathlib import Path

from pocketfed.model.config import STUDENTS

SHIPPED = "shipped"  # its name wherever a model is asked for
FOLDER = Path(__file__).parent / "students" / "pocket"


def located(model: str | Path) -> Path:
    """The folder a model's name stands for: the shipped student's, unless there is a folder of that name; else as given."""
    given = Path(model)
    return FOLDER if str(model) == SHIPPED and not given.exists() else given


def starts_untrained(model: str) -> bool:
    """Whether a name is a preset's: a geometry without weights. A preset's name comes before a folder's.

    A name that is neither is taken for a preset's, whose own message then says which there are.
    """
    return model in STUDENTS or not located(model).exists()
