"""The few errors of the library; each message is one sentence that a user can act on."""

from .text import printable

SENTENCE = 1000  # characters
SHORT = 300  # of a sentence with words of a file


class TenutoError(Exception):
    """Bad input or a model, file or machine that cannot do what was asked."""


class ArtifactError(TenutoError):
    """An artifact that cannot be read, or that belongs to another model.

    Its sentence may have words of the file: it is one line, of printable characters.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence, SHORT))


class ModelError(TenutoError):
    """A model that cannot be loaded, described or run."""


class SchemeError(TenutoError):
    """An unknown or impossible number format, scheme or recipe."""


class Cancelled(Exception):
    """Raised in `on_progress` to stop long work; what is finished stays on disk."""
