"""What a PeftModel offers, and what each adapter mode makes of it: the tests say so, and the table is written from them.

`python tests/feature_table.py` writes `docs/features.md`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


PAGE = Path(__file__).resolve().parent.parent / "docs" / "features.md"
HEAD = """# What works with which adapter mode

Every row is a test in `tests/test_tuner_features.py`, run once per mode. "Works" means that the test passes; otherwise the
call raises a `ValueError` or `TypeError` with the text shown. This page is generated: `python tests/feature_table.py`.

| feature | `adapter="lora"` | `adapter="full"` |
| --- | --- | --- |
"""
FEATURES: dict[str, dict[str, str | None]] = {}


def feature(name: str, *, lora: str | None = None, full: str | None = None) -> Callable[[Any], Any]:
    """Run the test for both modes; where a text is given, the mode must refuse the feature with an error that says it."""
    refused = {"lora": lora, "full": full}

    def decorate(test: Callable[..., None]) -> Any:
        FEATURES[name] = refused

        @functools.wraps(test)
        def run(*args: Any, adapter: str, **kwargs: Any) -> None:
            text = refused[adapter]
            if text is None:
                test(*args, adapter=adapter, **kwargs)
            else:
                with pytest.raises((ValueError, TypeError), match=re.escape(text)):
                    test(*args, adapter=adapter, **kwargs)

        return pytest.mark.parametrize("adapter", sorted(refused))(run)

    return decorate


def page() -> str:
    """The text of `docs/features.md`."""

    def said(text: str | None) -> str:
        return "works" if text is None else f'error: "{text}"'

    rows = [f"| {name} | {said(row['lora'])} | {said(row['full'])} |" for name, row in FEATURES.items()]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    import feature_table  # the tests fill in the module that they import, not this one
    import test_tuner_features  # noqa: F401

    PAGE.write_text(feature_table.page(), encoding="utf-8")
