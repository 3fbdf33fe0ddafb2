"""Other forms of operators, in which the padded size is no value and rows are picked by number.

A form computes the same at the exact size. Nothing is believed of it: the walk judges every operator that it is made
of, and masks what these read, as if the user had written them. Importing this package registers all forms.
"""

from . import attending, bags, constants, moves, selecting, sorting, statistics
from .form import form_of
from .site import Site

__all__ = ["Site", "attending", "bags", "constants", "form_of", "moves", "selecting", "sorting", "statistics"]
