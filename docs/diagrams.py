"""Draws docs/packages.svg from the imports of the code: who imports whom, and nothing that follows from others.

    python docs/diagrams.py

`tests/test_diagrams.py` holds the picture to the code.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
CODE = ROOT / "dairllm"
BASE = "errors, config, ..."
"""All modules that are in no package."""
WIDTH, HEIGHT, GAP, ROW = 150, 34, 30, 82
ABOUT = {
    BASE: "what all others use",
    "graph": "what a node computes",
    "formats": "files, views of them",
    "text": "text, ids, chat templates",
    "kernels": "arithmetic",
    "engine": "graph to program; threads",
    "paging": "weights from the disk",
    "protocol": "bytes to events",
    "net": "connections, signals",
    "runtime": "how one node computes",
    "cluster": "root, workers, handshake",
    "serving": "queue, answers, sampling",
    "api": "HTTP",
    "bench": "measuring",
    "commands": "one file a command",
    "cli": "the command line",
}


def imported(path: Path) -> Iterator[str]:
    """Modules of dairllm that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dairllm":
            inside = node.module.split(".")[1:]
            yield from [inside[0]] if inside else [alias.name for alias in node.names]


def package_of(name: str) -> str:
    return name if (CODE / name / "__init__.py").exists() else BASE


def arrows() -> dict[str, set[str]]:
    """Of each package, those that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(CODE.rglob("*.py")):
        parts = path.relative_to(CODE).parts
        own = parts[0] if len(parts) > 1 else BASE
        if path.name == "__main__.py":
            continue
        found.setdefault(own, set()).update(package_of(name) for name in imported(path))
    return {package: others - {package} for package, others in found.items()}


def floors(found: dict[str, set[str]]) -> dict[str, int]:
    """Of each package, how many stand below it, one upon the other."""
    heights: dict[str, int] = {}

    def height(package: str) -> int:
        if package not in heights:
            heights[package] = 1 + max((height(other) for other in found[package]), default=-1)
        return heights[package]

    for package in found:
        height(package)
    return heights


def direct(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Arrows that do not follow from others."""

    def reached(package: str) -> set[str]:
        return found[package].union(*(reached(other) for other in found[package])) if found[package] else set()

    return [
        (package, other)
        for package, others in sorted(found.items())
        for other in sorted(others)
        if not any(other in reached(third) for third in others - {other})
    ]


def packages_svg() -> str:
    """The picture."""
    found = arrows()
    heights = floors(found)
    order = list(ABOUT)
    rows = [sorted((one for one in found if heights[one] == floor), key=order.index) for floor in range(max(heights.values()) + 1)]
    width = max(map(len, rows)) * (WIDTH + GAP) + GAP
    height = len(rows) * ROW + GAP
    places = {}
    for floor, row in enumerate(rows):
        left = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        for number, package in enumerate(row):
            places[package] = left + number * (WIDTH + GAP), height - (floor + 1) * ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="13">',
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#667"/></marker>',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
    ]
    for package, other in direct(found):
        (x, y), (u, v) = places[package], places[other]
        start, end = (x + WIDTH / 2, y + HEIGHT + 14), (u + WIDTH / 2, v - 2)
        lines.append(
            f'<path d="M{start[0]:g} {start[1]:g}C{start[0]:g} {start[1] + 26:g} {end[0]:g} {end[1] - 26:g} {end[0]:g} {end[1]:g}" '
            'fill="none" stroke="#667" stroke-opacity=".6" marker-end="url(#tip)"/>'
        )
    for package, (x, y) in places.items():
        lines.append(f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT + 14}" rx="6" fill="#eef3fb" stroke="#557"/>')
        middle = x + WIDTH / 2
        lines.append(f'<text x="{middle:g}" y="{y + 19:g}" text-anchor="middle" font-weight="bold">{escape(package)}</text>')
        lines.append(f'<text x="{middle:g}" y="{y + 37:g}" text-anchor="middle" font-size="11" fill="#556">{escape(ABOUT[package])}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "packages.svg").write_text(packages_svg(), encoding="utf-8")
