"""The generated tables list what there is now, and the guides name files, options and releases that exist."""

from __future__ import annotations

import ast
import dataclasses
import re
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import cudagraph_backend as sg
from cudagraph_backend.debug import Debug
from cudagraph_backend.options import Options
from tests.architectures.catalogue import ARCHITECTURES
from tests.opinfo.report import rules
from tests.parity.catalogue import PROGRAMS
from tests.parity.table import described
from tests.support.ungenerated import Compile

ROOT = Path(__file__).parents[2]


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def first_cells(text: str, head: str) -> list[str]:
    """The first cell of each row, in all tables whose first column is called ``head``."""
    found: list[str] = []
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        rows = [re.split(r"(?<!\\) \| ", line.strip("| "))[0] for line in lines] if is_table else []
        found += rows[2:] if rows[:1] == [head] else []
    return found


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


# ---- generated tables


def test_capture_parity_lists_the_programs_of_the_catalogue():
    page = text_of("docs/capture_parity.md")
    programs = [described(program.name, program.what).replace("|", "\\|") for program in PROGRAMS]
    assert first_cells(page, "behaviour") == programs
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == [kind for kind, _ in groupby(p.kind for p in PROGRAMS)]
    assert f"**{len(PROGRAMS)} programs.**" in page


def test_padding_models_lists_the_architectures_of_the_catalogue():
    page = text_of("docs/padding_models.md")
    assert first_cells(page, "architecture") == [architecture.name for architecture in ARCHITECTURES]
    padded, total = map(int, re.search(r"(\d+) of (\d+) are padded throughout", page).groups())
    assert total == len(ARCHITECTURES)
    assert padded == page.count(" | padded | ")


def test_padding_operators_lists_every_operator_with_a_rule():
    """After a new rule: ``python -m tests.opinfo --jobs 2 --samples 8 --write docs/padding_operators.md``."""
    page = text_of("docs/padding_operators.md")
    assert section(page, "Operators with a rule").split() == " ".join(rules()[1:]).split()


def test_padding_operators_lists_every_entry_of_torchs_operators():
    page = text_of("docs/padding_operators.md")
    written_with = re.search(r"with torch ([\d.]+)\.\n", page)[1]
    if torch.__version__.split("+")[0] != written_with:
        pytest.skip(f"the table is that of torch {written_with}")
    found = re.findall(r"(\S+) \(\d+\)", section(page, "Safe and judged safe").split("\n\n")[-1])
    found += first_cells(page, "operator")
    found += section(page, "Not safe in any case").split("\n\n")[-1].strip().split(", ")
    for line in re.findall(r"^- \*\*.*?\*\*: (.*)$", section(page, "Not judged"), re.MULTILINE):
        found += line.split(", ")
    assert sorted(found) == sorted({op.formatted_name for op in op_db})


# ---- guides


def test_the_readme_lists_the_options():
    options = [f"`{field.name}`" for field in dataclasses.fields(Options)]
    assert sorted(first_cells(text_of("README.md"), "option")) == sorted(options)


def test_the_guide_for_contributors_lists_the_words_for_debugging():
    words = set(re.findall(r"SHAREDGRAPH_DEBUG=(\w+)", text_of("CONTRIBUTING.md")))
    assert words == {field.name for field in dataclasses.fields(Debug)}


def test_the_guide_for_contributors_names_files_that_exist():
    folders = "cudagraph_backend|tests|benchmarks|drivers|padding"
    paths = re.findall(rf"\b((?:{folders})/[\w/]+\.\w+)", text_of("CONTRIBUTING.md"))
    paths = [path for path in paths if "NAME" not in path]
    assert len(paths) > 20
    bases = (ROOT, ROOT / "cudagraph_backend")
    assert [path for path in paths if not any((base / path).exists() for base in bases)] == []


def test_one_list_of_releases_of_torch():
    (releases,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse(text_of("noxfile.py")).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "RELEASES"
    )
    first, last = releases[0], releases[-1]
    behind = f"{last.split('.')[0]}.{int(last.split('.')[1]) + 1}"
    assert f'"torch>={first},<{behind}"' in text_of("setup.py")
    quoted = ", ".join(f'"{release}"' for release in releases)
    assert f"torch: [{quoted}]" in text_of(".github/workflows/ci.yml")
    assert f"torch {first} to {last}." in text_of("README.md")


def centre(x: torch.Tensor) -> torch.Tensor:
    return x - x.median(0).values


def shown(text: str) -> list[str]:
    """Lines of ``explain()``, without the user's files, torch's names of sizes, and copies that are not made."""
    lines = [re.sub(r"\bs\d+\b", "s", line) for line in text.strip("\n").splitlines()]
    lines = [re.sub(r" at \S+:\d+ in|; \d+ copied in graphs", "", line) for line in lines]
    return [line for line in lines if not line.startswith(("region", "  from"))]


def test_the_readme_shows_what_explain_says(compiles: Compile):
    seen = section(text_of("README.md"), "Seeing what it does")
    blocks = [shown(block) for block in seen.split("```")[1::2] if "buckets:" in block]
    one_dim, two_dims = compiles(centre, dynamic=None), compiles(torch.exp)
    for n in (7, 9, 7):
        x = torch.randn(n, 4)
        torch._dynamo.mark_dynamic(x, 0)
        one_dim(x)
    assert shown(sg.explain()) == blocks[0]
    for shape in ((5, 20), (7, 24), (8, 17), (60, 78), (60, 60)):
        two_dims(torch.randn(shape))
    assert "\n".join(blocks[1]) in "\n".join(shown(sg.explain()))
