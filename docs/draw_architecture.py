"""Draw docs/architecture.svg: the folders of both packages and their imports, read from the sources of this checkout.

python docs/draw_architecture.py
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGES = ("data_pipeline", "train")
ENTRIES = "entry scripts"  # the files that lie directly in a package
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 168, 52, 22, 40, 24
Graph = Mapping[str, set[str]]


@dataclass(frozen=True, slots=True)
class Folder:
    """own: folders of its package that it imports; other: of the other package."""

    own: set[str]
    other: set[str]


def modules() -> dict[str, Path]:
    """Dotted name -> file, of both packages, without empty __init__.py."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files if p.name != "__init__.py"}


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of this checkout that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in known)


def place(module: str) -> tuple[str, str]:
    """Package and folder of a module."""
    package, *rest = module.split(".")
    return package, rest[0] if len(rest) > 1 else ENTRIES


def folders(package: str) -> dict[str, Folder]:
    """Folders of a package by name."""
    known = modules()
    found: dict[str, Folder] = {}
    for module, path in known.items():
        if place(module)[0] == package:
            name = place(module)[1]
            folder = found.get(name) or Folder(set(), set())
            targets = [place(target) for target in imported(path, known)]
            own = {to for other, to in targets if other == package and to != name}
            other = {to for other, to in targets if other != package}
            found[name] = Folder(folder.own | own, folder.other | other)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Floor of each folder: one above the highest that it imports. A circle is an error."""
    levels: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError("imports run in a circle: " + " -> ".join((*above[above.index(name) :], name)))
        if name not in levels:
            levels[name] = max((level(to, (*above, name)) + 1 for to in sorted(graph[name])), default=0)
        return levels[name]

    return {name: level(name) for name in sorted(graph)}


def direct(graph: Graph) -> list[tuple[str, str]]:
    """The arrows that don't follow from others: a -> c is left out where a -> b -> c is there."""

    def reached(name: str) -> set[str]:
        return set().union(*({to} | reached(to) for to in graph[name]))

    return sorted((a, b) for a in graph for b in graph[a] if not any(b in reached(to) for to in graph[a] - {b}))


def chains(graph: Graph) -> list[list[str]]:
    """Each direct arrow as the boxes and, on the floors between, the places of its own (a>b@floor) that it passes."""
    level = floors(graph)
    return [
        [a, *(f"{a}>{b}@{floor}" for floor in range(level[a] - 1, level[b], -1)), b] for a, b in sorted(direct(graph))
    ]


def rows_of(graph: Graph) -> list[list[str]]:
    """Boxes and places by floor, the highest floor first, each above the middle of what its arrows lead to."""
    level = floors(graph)
    below: dict[str, list[str]] = {name: [] for name in graph}
    for chain in chains(graph):
        for upper, lower in pairwise(chain):
            below.setdefault(upper, []).append(lower)
    floor_of = {name: level[name] if name in level else int(name.rpartition("@")[2]) for name in below}
    rows: list[list[str]] = [[] for _ in range(max(level.values()) + 1)]
    for name in sorted(below):
        rows[floor_of[name]].append(name)
    for lower, row in pairwise(rows):
        at = {name: (i + 0.5) / len(lower) for i, name in enumerate(lower)}
        middles = {
            name: [at[to] for to in below[name] if to in at]
            or [sum(at.values()) / len(at)]  # of a box, one arrow leads to the floor below at least
            for name in row
        }
        row.sort(key=lambda name, middles=middles: sum(middles[name]) / len(middles[name]))
    return rows[::-1]


def positions(rows: Sequence[Sequence[str]], left: float, top: float) -> dict[str, tuple[float, float]]:
    """Middle of each name's upper edge; rows are centred, and a place is narrow."""
    wide = {name: GAP_X if ">" in name else WIDTH for row in rows for name in row}
    widths = [sum(wide[name] + GAP_X for name in row) - GAP_X for row in rows]
    at = {}
    for floor, (row, width) in enumerate(zip(rows, widths, strict=True)):
        x = left + (max(widths) - width) / 2
        for name in row:
            at[name] = (x + wide[name] / 2, top + floor * (HEIGHT + GAP_Y))
            x += wide[name] + GAP_X
    return at


def arrow(points: Sequence[tuple[float, float]]) -> str:
    """A smooth line from the lower edge of the first box, through places, to the upper edge of the last."""
    x, y = points[0][0], points[0][1] + HEIGHT
    path = f"M{x:.0f} {y:.0f}"
    for to_x, to_y in points[1:]:
        half = (y + to_y) / 2
        path += f" C{x:.0f} {half:.0f} {to_x:.0f} {half:.0f} {to_x:.0f} {to_y:.0f}"
        x, y = to_x, to_y
        if (to_x, to_y) != points[-1]:
            y += HEIGHT
            path += f" V{y:.0f}"
    return f'<path d="{path}" class="arrow" marker-end="url(#tip)"/>'


def box(name: str, folder: Folder, x: float, y: float) -> str:
    """A folder, and what it imports of the other package."""
    title = ENTRIES if name == ENTRIES else f"{name}/"
    other = textwrap.wrap("+ " + ", ".join(sorted(folder.other)), 30) if folder.other else []
    lines = [("name", title), *(("other", line) for line in other)]
    first = y + (HEIGHT - 14 * len(lines)) / 2 + 11
    return "\n".join(
        [
            f'<rect x="{x - WIDTH / 2:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>',
            *(
                f'<text x="{x:.0f}" y="{first + 14 * i:.0f}" class="{kind}">{escape(line)}</text>'
                for i, (kind, line) in enumerate(lines)
            ),
        ]
    )


def panel(package: str, left: float, top: float) -> tuple[str, float, float]:
    """A package's drawing, and its right and lower edge."""
    found = folders(package)
    graph = {name: folder.own for name, folder in found.items()}
    at = positions(rows_of(graph), left, top + 34)
    lines = [f'<text x="{left:.0f}" y="{top + 14:.0f}" class="title">{package}/</text>']
    lines += [arrow([at[name] for name in chain]) for chain in chains(graph)]
    lines += [box(name, folder, *at[name]) for name, folder in sorted(found.items())]
    right, low = max(x for x, _ in at.values()) + WIDTH / 2, max(y for _, y in at.values()) + HEIGHT
    return "\n".join(lines), right, low


STYLE = """text { font-family: sans-serif; text-anchor: middle; fill: #1c2733 }
.name { font-size: 14px; font-weight: bold } .small { font-size: 11px; fill: #5b6b7b }
.other { font-size: 10px; fill: #8a5a00 } .title { font-size: 16px; font-weight: bold; text-anchor: start }
rect { fill: #eef3f9; stroke: #7d93ab }
.legend { text-anchor: start } .arrow { fill: none; stroke: #7d93ab; stroke-width: 1.3 }"""


def drawn() -> str:
    """The whole picture: one panel a package."""
    parts, left, low = [], float(MARGIN), 0.0
    for package in PACKAGES:
        part, right, bottom = panel(package, left, MARGIN)
        parts.append(part)
        left, low = right + 3 * MARGIN, max(low, bottom)
    width, height = left - 2 * MARGIN, low + 3 * MARGIN
    legend = "An arrow: imports. Arrows that follow from others are left out. +: folders of the other package."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">',
            f"<title>Folders and their imports</title>\n<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#7d93ab"/></marker></defs>',
            f'<path d="M0 0 H{width:.0f} V{height:.0f} H0 z" fill="#ffffff"/>',
            *parts,
            f'<text x="{MARGIN}" y="{height - MARGIN:.0f}" class="small legend">{legend}</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(drawn())
    print(PICTURE.relative_to(ROOT))
