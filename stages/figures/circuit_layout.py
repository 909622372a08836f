"""Where everything of a circuit goes in its picture (see `circuit_picture`): boxes of groups, pills of heads, paths.

1. Positions are columns, from left to right; layers that hold a head are rows, the highest on top.
2. A group is a box in the column of its position, over the rows of its layers. Boxes of one column that share rows
   stand side by side, in lanes; groups of the same heads at the same position share a box.
3. A head is a pill in its box and row. Heads that would stand on one another, one in each row, are staggered, so that
   their paths do not hide behind them.
4. A path goes from a head to a port of the box that it feeds: at its bottom from a box that stands below it
   at the same position, else at the side that faces the head, in the row of its highest layer. So paths go up. There
   is one port for each input (q, k, v) and side.

Lengths are pixels, y grows downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from stages.circuits.circuit import LOGITS, Circuit, Group
from stages.pipeline.stage import Invalid

PILL_WIDTH, PILL_HEIGHT, GAP = 46.0, 21.0, 6.0
PAD = 8.0  # between the border of a box and its pills
LABEL = 17.0  # height of a box's name
MARGIN_LEFT, MARGIN_TOP, MARGIN_BOTTOM = 64.0, 112.0, 124.0
LANE_GAP, COLUMN_PAD = 26.0, 26.0
ROW_GAP = 18.0
PORT_GAP = 20.0  # between the middles of ports at one side
IN_A_LINE = 4  # heads of one group and layer that stand side by side; more are wrapped
LETTER = 7.3  # width of a letter of a name
LONGEST_NAME = 26  # letters; longer names are cut, and are whole in the title
NARROWEST = 560.0


@dataclass(eq=False)
class Pill:
    """One head of one group; x and y are its centre.

    Attributes:
        score: None where unknown.
        sign: that of its group: +1 raises the measure, -1 lowers it. (Of a score by itself the metric would say which.)
    """

    layer: int
    head: int
    score: float | None
    sign: int
    x: float = 0.0
    y: float = 0.0


@dataclass(eq=False)
class Box:
    """The groups of the same heads at one position."""

    position: str
    groups: list[Group]
    pills: list[Pill]
    lane: int = 0
    left: float = 0.0
    top: float = 0.0
    right: float = 0.0
    bottom: float = 0.0

    @property
    def name(self) -> str:
        name = self.groups[0].name
        return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"

    @property
    def layers(self) -> range:
        """From the lowest to the highest."""
        return range(min(pill.layer for pill in self.pills), max(pill.layer for pill in self.pills) + 1)

    def lines(self, layer: int) -> list[list[Pill]]:
        """The heads of a layer, line by line."""
        here = sorted((pill for pill in self.pills if pill.layer == layer), key=lambda pill: pill.head)
        return [here[first : first + IN_A_LINE] for first in range(0, len(here), IN_A_LINE)]

    def places(self) -> list[list[tuple[Pill, float]]]:
        """Every line from top to bottom, each pill with its distance from the middle of the box."""
        step = PILL_WIDTH + GAP
        lines = [line for layer in reversed(self.layers) for line in self.lines(layer)]
        found, alone = [], 0
        for line in lines:
            alone = alone + 1 if len(line) == 1 else 0
            stagger = (0.0, step / 2, -step / 2)[(alone - 1) % 3] if alone else 0.0
            found.append([(pill, stagger + step * (at - (len(line) - 1) / 2)) for at, pill in enumerate(line)])
        return found

    @property
    def width(self) -> float:
        reach = max(abs(away) for line in self.places() for _, away in line) + PILL_WIDTH / 2
        return max(2 * reach, LETTER * len(self.name)) + 2 * PAD


class Side(StrEnum):
    """Where a path enters a box."""

    BOTTOM = "bottom"
    LEFT = "left"
    RIGHT = "right"


@dataclass(eq=False)
class Port:
    """Where paths enter a box, or the logits (box None); x and y are its middle."""

    box: Box | None
    component: str | None
    side: Side
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Path:
    """From a head to a port.

    Attributes:
        sideways: whether it leaves the head at the side that faces the port, since no other head of its line is there;
            else at its top.
    """

    pill: Pill
    group: Group
    port: Port
    sideways: bool


@dataclass
class Layout:
    """A circuit laid out.

    Attributes:
        positions: the columns, with left and right edge of each.
        rows: layer -> y of its middle.
        logits: middle of the box of the logits.
    """

    boxes: list[Box] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    positions: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: dict[int, float] = field(default_factory=dict)
    logits: tuple[float, float] = (0.0, 0.0)
    width: float = NARROWEST
    height: float = MARGIN_TOP + MARGIN_BOTTOM


def layout(circuit: Circuit, positions: Sequence[str] | None = None) -> Layout:
    """Lay a circuit out.

    Args:
        positions: columns from left to right; None: those of the circuit, last found first, as circuits are found from
            the output backwards.

    Raises:
        Invalid: a position of the circuit is not among them.
    """
    of_circuit = list(dict.fromkeys(group.position for group in circuit.groups if group.heads))[::-1]
    columns = of_circuit if positions is None else [name for name in positions if name in of_circuit]
    if missing := sorted(set(of_circuit) - set(columns)):
        raise Invalid(f"positions {list(positions or ())} lack {', '.join(missing)}: must name all of the circuit's")
    found = Layout(_boxes(circuit))
    if found.boxes:
        _place_rows(found)
        _place_columns(found, columns)
        _place_boxes(found)
        _connect(found)
    return found


def _boxes(circuit: Circuit) -> list[Box]:
    boxes: dict[tuple[str, frozenset[tuple[int, int]]], Box] = {}
    for group in circuit.groups:
        if not group.heads:
            continue
        scores: Sequence[float | None] = group.scores or [None] * len(group.heads)
        pills = [Pill(*head, score, group.sign) for head, score in zip(group.heads, scores, strict=True)]
        key = (group.position, frozenset(group.heads))
        boxes.setdefault(key, Box(group.position, [], pills)).groups.append(group)
    return list(boxes.values())


def _place_rows(found: Layout) -> None:
    """Rows from top to bottom, as high as the fullest box needs, with room above for the names of boxes."""
    y = MARGIN_TOP
    for layer in sorted({pill.layer for box in found.boxes for pill in box.pills}, reverse=True):
        here = [box for box in found.boxes if layer in box.layers]
        above = LABEL + PAD if any(layer == box.layers[-1] for box in here) else 0.0
        below = PAD if any(layer == box.layers[0] for box in here) else 0.0
        lines = max(len(box.lines(layer)) for box in here)
        height = lines * (PILL_HEIGHT + GAP) - GAP
        found.rows[layer] = y + above + height / 2
        y += above + height + below + ROW_GAP
    found.height = y - ROW_GAP + MARGIN_BOTTOM


def _place_columns(found: Layout, columns: Sequence[str]) -> None:
    """Lanes of each column: a box takes the first one in which its rows are free, in the order of the circuit."""
    left = MARGIN_LEFT
    for position in columns:
        lanes: list[list[Box]] = []
        here = [box for box in found.boxes if box.position == position]
        for box in here:
            rows = set(box.layers)
            free = [lane for lane in lanes if not any(rows & set(other.layers) for other in lane)]
            if free:
                free[0].append(box)
            else:
                lanes.append([box])
        x = left + COLUMN_PAD
        for lane in lanes:
            width = max(box.width for box in lane)
            for box in lane:
                box.left, box.right = x + (width - box.width) / 2, x + (width + box.width) / 2
            x += width + LANE_GAP
        right = max(x - LANE_GAP + COLUMN_PAD, left + LETTER * len(position) + COLUMN_PAD)
        found.positions[position] = (left, right)
        left = right + 8
    found.width = max(left + 16, NARROWEST)


def _place_boxes(found: Layout) -> None:
    for box in found.boxes:
        middle = (box.left + box.right) / 2
        for line in box.places():
            lines = box.lines(line[0][0].layer)
            number = next(number for number, entry in enumerate(lines) if line[0][0] in entry)
            for pill, away in line:
                pill.x = middle + away
                pill.y = found.rows[pill.layer] + (number - (len(lines) - 1) / 2) * (PILL_HEIGHT + GAP)
        box.top = min(pill.y for pill in box.pills) - PILL_HEIGHT / 2 - PAD - LABEL
        box.bottom = max(pill.y for pill in box.pills) + PILL_HEIGHT / 2 + PAD


def _connect(found: Layout) -> None:
    """Ports where paths arrive, and the paths."""
    readers = [box for box in found.boxes if any(group.receiver == LOGITS for group in box.groups)] or found.boxes
    found.logits = (sum((box.left + box.right) / 2 for box in readers) / len(readers), MARGIN_TOP - 42)
    ports: dict[tuple[int, str | None, Side], Port] = {}
    for box in found.boxes:
        for group in box.groups:
            receiver = _box_of(found, group.receiver)
            if receiver is None and group.receiver != LOGITS:
                continue
            component = None if group.component is None else str(group.component)
            side = _facing(box, receiver)
            port = ports.setdefault((id(receiver), component, side), Port(receiver, component, side))
            for line in box.places():
                end = {Side.LEFT: line[-1][0], Side.RIGHT: line[0][0], Side.BOTTOM: None}[side]
                found.paths += [Path(pill, group, port, pill is end) for pill, _ in line]
    found.ports = list(ports.values())
    _place_ports(found)


def _box_of(found: Layout, receiver: str | None) -> Box | None:
    return next((box for box in found.boxes if any(group.name == receiver for group in box.groups)), None)


def _facing(box: Box, receiver: Box | None) -> Side:
    """The side of the receiver at which paths from a box arrive."""
    if receiver is None or (receiver.position == box.position and box.top >= receiver.bottom):
        return Side.BOTTOM
    return Side.LEFT if box.left < receiver.left else Side.RIGHT


def _place_ports(found: Layout) -> None:
    """Ports of one side of a box beside each other, q before k before v."""
    for port in found.ports:
        if port.box is None:
            port.x, port.y = found.logits[0], found.logits[1] + 13
            continue
        beside = [other for other in found.ports if (other.box, other.side) == (port.box, port.side)]
        beside.sort(key=lambda other: "qkv".find(other.component or "q"))
        shift = PORT_GAP * (beside.index(port) - (len(beside) - 1) / 2)
        if port.side == Side.BOTTOM:
            port.x, port.y = (port.box.left + port.box.right) / 2 + shift, port.box.bottom
        else:
            port.x = port.box.left if port.side == Side.LEFT else port.box.right
            port.y = found.rows[port.box.layers[-1]] + shift
