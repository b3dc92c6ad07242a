"""What an app embeds to fine-tune on the device: base dependencies only.

from pocketfed.client_sdk import Device
"""

import importlib
from typing import TYPE_CHECKING, Any

from pocketfed.client_sdk.errors import (
    ArtifactError,
    ConfigurationError,
    LinkError,
    NoExamples,
    PocketfedError,
    StorageError,
    TrainingDiverged,
    TrainingError,
    TrainingStopped,
    UnsupportedError,
    UntrustedError,
)

if TYPE_CHECKING:
    from pocketfed.client_sdk.conditions import Conditions, Readings
    from pocketfed.client_sdk.device import Device, Prediction
    from pocketfed.client_sdk.status import Progress, State

__all__ = [
    "ArtifactError",
    "Conditions",
    "ConfigurationError",
    "Device",
    "LinkError",
    "NoExamples",
    "PocketfedError",
    "Prediction",
    "Progress",
    "Readings",
    "State",
    "StorageError",
    "TrainingDiverged",
    "TrainingError",
    "TrainingStopped",
    "UnsupportedError",
    "UntrustedError",
]
_MODULES = {
    "Conditions": "conditions",
    "Device": "device",
    "Prediction": "device",
    "Progress": "status",
    "Readings": "conditions",
    "State": "status",
}


def __getattr__(name: str) -> Any:
    """`Device` brings gRPC and numpy; simulations that need neither do not pay for them."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
