"""The package is built as docs/architecture.md says."""

import ast
import re
from pathlib import Path

import plastic_peft


PACKAGE = Path(plastic_peft.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
# the package as a whole, and what starts it
ENTRIES = {"__init__", "__main__"}


def levels():
    """Name of each module or subpackage to its row in the table."""
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    names = [re.findall(r"`([\w/]+?)(?:\.py|/)`", row) for row in rows]
    return {name: level for level, row in enumerate(names) for name in row}


def imported(path):
    """Modules and subpackages of the package that a file imports, at its top or inside functions."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]


def test_no_module_imports_a_later_one():
    """Without it imports could run in circles, and nobody could read the package from its beginning."""
    order, wrong = levels(), []
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("assets",)]
    for path in files:
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here not in ENTRIES:
            wrong += [f"{here} imports {name}" for name in imported(path) if order.get(name, -1) > order[here]]
    assert len(files) > 20 and not wrong, wrong


def test_every_module_has_a_row():
    """Without it the page would lose what is new, and newcomers their way."""
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - ENTRIES <= set(levels())
