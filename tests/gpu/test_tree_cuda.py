"""The tests of the tree once more on a GPU (apart: they run without gradients)."""

from tests.end_to_end.test_tree import *  # noqa: F403
