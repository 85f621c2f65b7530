"""Errors of the runtime."""

from nf4format.errors import Nf4Error


class LoadError(Nf4Error):
    """A packed file, adapter or tokenizer cannot be used by the runtime."""


class TrainError(Nf4Error):
    """Training data or settings cannot be used, or a run went wrong (loss not finite)."""
