"""The errors that eqxmeta raises, and the one shape that their messages have."""


def explain(invalid: str, received: object, expected: str) -> str:
    """Three parts: what is invalid, what was received, what was expected."""
    return f"{invalid}\nReceived: {received}\nExpected: {expected}"


class NonFiniteError(FloatingPointError):
    """A metric or a parameter became NaN or infinite during training."""

    def __init__(self, message: str, *, step: int, name: str):
        super().__init__(message)
        self.step = step
        self.name = name


class CheckpointError(Exception):
    """Base of everything that can be wrong with a checkpoint."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class CheckpointCorrupt(CheckpointError):
    """The file is damaged: its bytes do not match its own manifest."""


class CheckpointMismatch(CheckpointError):
    """The file is sound, but belongs to another model, strategy or configuration."""


class CheckpointInUse(CheckpointError):
    """Another run is writing to the folder."""


class CheckpointTooNew(CheckpointError):
    """The file was written by a newer eqxmeta, in a format that this one does not know."""
