"""x"""
from dataclasses import dataclass, field
@dataclass(frozen=True)
class Example:
    text: str
    label: str | None = None
    text_pair: str | None = None
    user: str | None = None
    fields: dict = field(default_factory=dict)
@dataclass(frozen=True)
class Dataset:
    name: str
    train: tuple
    dev: tuple
    test: tuple
    labels: tuple
    skipped: dict
