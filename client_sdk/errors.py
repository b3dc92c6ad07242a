"""What can go wrong on a device, as one tree. Each message is a sentence with the offending value and the remedy."""


class PocketfedError(Exception):
    """The root: an app that wants to survive anything of ours catches this."""


class ConfigurationError(PocketfedError, ValueError):
    """An argument that cannot be used."""


class ArtifactError(PocketfedError):
    """An artifact that is incomplete, damaged or not for this SDK; it is never loaded."""


class UntrustedError(ArtifactError):
    """An artifact that the pinned publisher has not signed, or no longer stands for; the model in use is kept."""


class UnsupportedError(ArtifactError):
    """An artifact that this SDK is too old for, or cannot run here; it is never tried, and the model in use is kept."""


class StorageError(PocketfedError):
    """The disk is full, or the device has used what it may."""


class LinkError(PocketfedError):
    """The coordinator cannot be reached, or refused."""


class TrainingError(PocketfedError):
    """Local training that gave no update."""


class TrainingStopped(TrainingError):  # noqa: N818 - a request, not a fault
    """The app or the coordinator asked to stop."""


class TrainingDiverged(TrainingError):  # noqa: N818
    """The loss or the parameters are no longer finite; nothing is sent."""


class NoExamples(TrainingError):  # noqa: N818
    """The device has nothing to train on."""
