"""The footguns once more, on a GPU with the cuda driver (apart from the others: they run without gradients)."""

from tests.end_to_end.test_footguns import *  # noqa: F403
