"""All programs, in the order of the table."""

from __future__ import annotations

from tests.parity.program import Program
from tests.parity.programs import draws, memory, operators, partitions, shapes, training

SECTIONS = (partitions, shapes, draws, memory, operators, training)
PROGRAMS: tuple[Program, ...] = tuple(program for module in SECTIONS for program in module.section.programs)
