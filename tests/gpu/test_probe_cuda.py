"""The tests of the probe once more, on a GPU with the cuda driver (apart: they run without gradients)."""

from tests.end_to_end.test_probe import *  # noqa: F403

# Python code of an operator runs when a graph is captured, not when it is replayed, and may not wait for the GPU.
del test_padding_that_is_off_is_not_probed  # noqa: F821
del test_the_region_runs_three_times_more_per_padded_size_and_no_more  # noqa: F821
del test_a_reset_forgets_the_verdict  # noqa: F821
del test_errors_of_the_call_itself_are_the_callers  # noqa: F821
del test_an_operator_that_raises_for_what_padded_rows_hold  # noqa: F821
