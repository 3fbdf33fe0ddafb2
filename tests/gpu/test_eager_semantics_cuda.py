"""Eager's semantics once more, on a GPU with the cuda driver."""

from tests.end_to_end.test_eager_semantics import *  # noqa: F403

# Python code of an operator runs when a graph is captured, not when it is replayed.
del test_an_operator_that_raises_in_some_calls  # noqa: F821
