"""The end-to-end tests once more, on a GPU with the cuda driver."""

from tests.end_to_end.test_effects import *  # noqa: F403
from tests.end_to_end.test_fill import *  # noqa: F403
from tests.end_to_end.test_handed_out import *  # noqa: F403
from tests.end_to_end.test_inputs import *  # noqa: F403
from tests.end_to_end.test_lifetimes import *  # noqa: F403
from tests.end_to_end.test_models import *  # noqa: F403
from tests.end_to_end.test_parts import *  # noqa: F403
from tests.end_to_end.test_regressions import *  # noqa: F403
from tests.end_to_end.test_sequences import *  # noqa: F403
from tests.end_to_end.test_training import *  # noqa: F403
from tests.end_to_end.test_uncommon_inputs import *  # noqa: F403
from tests.end_to_end.test_unexpected import *  # noqa: F403
from tests.end_to_end.test_users_rules import *  # noqa: F403
from tests.end_to_end.test_values import *  # noqa: F403

del test_results_of_a_compiled_numpy_function_are_kept  # noqa: F821  # these are on the CPU
del test_a_bad_index_is_an_error_and_leaves_the_backend_usable  # noqa: F821  # ends the process's CUDA context
