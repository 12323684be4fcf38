"""Pictures in docs/ show what the code is."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_picture_of_the_packages_is_that_of_their_imports() -> None:
    """Else: python docs/diagrams.py"""
    spec = importlib.util.spec_from_file_location("diagrams", ROOT / "docs" / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    diagrams = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagrams)
    assert diagrams.packages_svg() == (ROOT / "docs" / "packages.svg").read_text(encoding="utf-8")
