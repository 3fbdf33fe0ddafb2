"""The tests of the tree, and random programs, once more on a GPU (apart: they run without gradients)."""

from tests.end_to_end.test_state_machine import *  # noqa: F403
from tests.end_to_end.test_tree import *  # noqa: F403
