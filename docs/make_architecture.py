"""Draws the house from its imports into docs/architecture.svg: `python docs/make_architecture.py`."""

from html import escape
from pathlib import Path

import grimp

HERE = Path(__file__).parent
# Floors from the ground up; rooms of one floor from left to right.
FLOORS = (
    ("hier_losses", "hyper_geom"),
    ("hier_lora", "mat_align", "hyper_blip", "hyper_icl"),
    ("app_data.store", "app_data.read", "app_data.sets", "app_data.weights"),
    ("app_eval.measure", "app_eval.ask", "app_eval.show"),
    ("app_train.core", "app_train.recipes"),
)
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
WIDTH, ROOM, GAP, HEIGHT, FLOOR = 860, 150, 24, 44, 108


def arrows() -> list[tuple[str, str]]:
    """Which room imports which; what another arrow leads to anyway is left out."""
    rooms = [room for floor in FLOORS for room in floor]
    graph = grimp.build_graph(*sorted({room.partition(".")[0] for room in rooms}), cache_dir=None)
    inside = {room: {room, *graph.find_descendants(room)} for room in rooms}
    owner = {module: room for room, modules in inside.items() for module in modules}
    found = set()
    for module, room in owner.items():
        for imported in graph.find_modules_directly_imported_by(module):
            if imported in owner and owner[imported] != room:
                found.add((room, owner[imported]))
    # The long arrows go first, so that the short ones stay.
    for pair in sorted(found, key=lambda pair: (LEVEL[pair[1]] - LEVEL[pair[0]], pair)):
        if _leads(pair, found - {pair}):
            found.discard(pair)
    return sorted(found)


def _leads(pair: tuple[str, str], pairs: set[tuple[str, str]]) -> bool:
    reached, new = {pair[0]}, {pair[0]}
    while new:
        new = {end for start, end in pairs if start in new} - reached
        reached |= new
    return pair[1] in reached


def drawing(pairs: list[tuple[str, str]]) -> str:
    """The house as one SVG element; arrows point at what is imported."""
    place = {}
    for level, floor in enumerate(FLOORS):
        left = (WIDTH - len(floor) * ROOM - (len(floor) - 1) * GAP) / 2
        for number, room in enumerate(floor):
            place[room] = (left + number * (ROOM + GAP), 20 + (len(FLOORS) - 1 - level) * FLOOR)
    lines = []
    for start, end in pairs:
        (x, y), (u, v) = place[start], place[end]
        if y == v:
            ends = (x + (ROOM if u > x else 0), y + HEIGHT / 2, u + (0 if u > x else ROOM), v + HEIGHT / 2)
            if abs(u - x) > ROOM + GAP:  # over the rooms between
                middle = f"Q{(x + u + ROOM) / 2:.0f} {y - 26:.0f}"
                lines.append(f'<path d="M{x + ROOM / 2:.0f} {y:.0f} {middle} {u + ROOM / 2:.0f} {v:.0f}"/>')
                continue
        else:
            ends = (x + ROOM / 2, y + HEIGHT, u + ROOM / 2, v)
        lines.append('<line x1="{:.0f}" y1="{:.0f}" x2="{:.0f}" y2="{:.0f}"/>'.format(*ends))
    boxes = [
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{ROOM}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x + ROOM / 2:.0f}" y="{y + 28:.0f}">{escape(room)}</text>'
        for room, (x, y) in place.items()
    ]
    height = len(FLOORS) * FLOOR - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#8a93a6" stroke="none"/></marker></defs>\n'
        '<g stroke="#8a93a6" stroke-width="1.2" fill="none" marker-end="url(#tip)">\n' + "\n".join(lines) + "\n</g>\n"
        '<g fill="#eef1f8" stroke="#3f51b5">\n' + "\n".join(box.partition("<text")[0] for box in boxes) + "\n</g>\n"
        '<g fill="#1a237e" text-anchor="middle">\n'
        + "\n".join("<text" + box.partition("<text")[2] for box in boxes)
        + "\n</g>\n"
        "</svg>\n"
    )


if __name__ == "__main__":
    (HERE / "architecture.svg").write_text(drawing(arrows()), encoding="utf-8")
