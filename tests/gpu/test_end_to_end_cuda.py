"""The end-to-end tests once more, on a GPU with the cuda driver."""

from tests.end_to_end.test_effects import *  # noqa: F403
from tests.end_to_end.test_fill import *  # noqa: F403
from tests.end_to_end.test_inputs import *  # noqa: F403
from tests.end_to_end.test_lifetimes import *  # noqa: F403
from tests.end_to_end.test_models import *  # noqa: F403
from tests.end_to_end.test_probe import *  # noqa: F403
from tests.end_to_end.test_regressions import *  # noqa: F403
from tests.end_to_end.test_sequences import *  # noqa: F403
from tests.end_to_end.test_training import *  # noqa: F403
from tests.end_to_end.test_users_rules import *  # noqa: F403
from tests.end_to_end.test_values import *  # noqa: F403

# Python code of an operator runs when a graph is captured, not when it is replayed, and may not wait for the GPU.
del test_padding_that_is_off_is_not_probed  # noqa: F821
del test_the_region_runs_three_times_more_per_padded_size_and_no_more  # noqa: F821
del test_a_reset_forgets_the_verdict  # noqa: F821
del test_errors_of_the_call_itself_are_the_callers  # noqa: F821
del test_an_operator_that_raises_for_what_padded_rows_hold  # noqa: F821
del test_a_bad_index_is_an_error_and_leaves_the_backend_usable  # noqa: F821  # ends the process's CUDA context
