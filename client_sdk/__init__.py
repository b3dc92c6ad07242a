"""What an app embeds to fine-tune on the device: base dependencies only.

from pocketfed.client_sdk import Device
"""

from typing import TYPE_CHECKING, Any

from pocketfed.client_sdk.errors import (
    ArtifactError,
    ConfigurationError,
    LinkError,
    NoExamples,
    PocketfedError,
    RunRefused,
    TrainingDiverged,
    TrainingError,
    TrainingStopped,
    UntrustedError,
)

if TYPE_CHECKING:
    from pocketfed.client_sdk.consent import RunDescription
    from pocketfed.client_sdk.device import Device, Prediction

__all__ = [
    "ArtifactError",
    "ConfigurationError",
    "Device",
    "LinkError",
    "NoExamples",
    "PocketfedError",
    "Prediction",
    "RunDescription",
    "RunRefused",
    "TrainingDiverged",
    "TrainingError",
    "TrainingStopped",
    "UntrustedError",
]


def __getattr__(name: str) -> Any:
    """`Device` brings gRPC and numpy; simulations that need neither do not pay for them."""
    if name in ("Device", "Prediction"):
        from pocketfed.client_sdk import device

        return getattr(device, name)
    if name == "RunDescription":
        from pocketfed.client_sdk import consent

        return consent.RunDescription
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
