"""The ways in, overrides and copies once more, on a GPU with the cuda driver."""

from tests.end_to_end.test_copies import *  # noqa: F403
from tests.end_to_end.test_override_cudagraphs import *  # noqa: F403
from tests.end_to_end.test_ways_in import *  # noqa: F403
