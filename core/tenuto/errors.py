"""The few errors of the library; each message is one sentence that a user can act on."""


class TenutoError(Exception):
    """Bad input or a model, file or machine that cannot do what was asked."""


class ArtifactError(TenutoError):
    """An artifact that cannot be read, or that belongs to another model."""


class ModelError(TenutoError):
    """A model that cannot be loaded, described or run."""


class SchemeError(TenutoError):
    """An unknown or impossible number format, scheme or recipe."""


class Cancelled(Exception):
    """Raised in `on_progress` to stop long work; what is finished stays on disk."""
