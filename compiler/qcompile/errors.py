"""Errors of the compiler."""

from nf4format.errors import Nf4Error


class CompileError(Nf4Error):
    """A checkpoint cannot be compiled, or the output cannot be written."""


class EvaluationError(CompileError):
    """A whole file that could not be evaluated, or predicts worse than one of the level below."""
