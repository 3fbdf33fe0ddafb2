"""Random programs once more, on a GPU."""

from tests.end_to_end.test_state_machine import *  # noqa: F403
