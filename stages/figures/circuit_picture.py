"""Any circuit as one picture that stands alone: an SVG file, text kept as text, without scripts.

Positions go across, layers that hold a head go up. A group is a box, a head a pill ("9.6": layer 9, head 6), a path a
line from the head to the input (q, k, v) of the group that it feeds, as thick as its effect is large. What raises the
measure is blue and solid, what lowers it vermilion and dashed. Every head says in its title (shown under the pointer)
what is known of it.

    python -m stages.figures.circuit_picture circuit.json out.svg [--positions io s1 end] [--kv-heads 3] [--title TEXT]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path as File
from xml.sax.saxutils import escape

from stages.circuits.circuit import LOGITS, Circuit, Group
from stages.figures.circuit_layout import (
    LABEL,
    MARGIN_LEFT,
    MARGIN_TOP,
    PILL_HEIGHT,
    PILL_WIDTH,
    Box,
    Layout,
    Path,
    Pill,
    Port,
    Side,
    layout,
)
from stages.pipeline.command import exit_status
from stages.pipeline.files import write_text
from stages.pipeline.stage import Invalid

# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart, and the greys of the other figures. (Their
# module sets matplotlib's backend, which a notebook that draws a circuit should keep.)
RAISES, LOWERS = "#0072B2", "#D55E00"
INK, SOFT, FAINT, COLUMN = "#222222", "#666666", "#DDDDDD", "#F6F6F6"
THINNEST, THICKEST = 1.0, 9.0  # of a path
INPUTS = {"q": "queries", "k": "keys", "v": "values"}


def picture(
    circuit: Circuit,
    path: str | File,
    positions: Sequence[str] | None = None,
    n_kv_heads: int | None = None,
    title: str | None = None,
) -> File:
    """Draw a circuit, found or imported, into an SVG file.

    Args:
        circuit: its scores, where it has them, become widths of paths and shades of heads.
        path: of the file; what is there is replaced.
        positions: columns from left to right; None: those of the circuit, last found first.
        n_kv_heads: key-value heads of a layer, if query heads share them; they are then named where keys and values
            are read.
        title: None: the circuit's size.

    Returns:
        the path.

    Raises:
        Invalid: positions lack one of the circuit's, or key-value heads do not divide the query heads.
    """
    if n_kv_heads is not None and (n_kv_heads < 1 or circuit.n_heads % n_kv_heads):
        raise Invalid(f"n_kv_heads = {n_kv_heads}: must divide the {circuit.n_heads} heads of a layer")
    write_text(path, drawn(circuit, layout(circuit, positions), n_kv_heads, title))
    return File(path)


def drawn(circuit: Circuit, found: Layout, n_kv_heads: int | None, title: str | None) -> str:
    """The text of the file."""
    size = (
        f"{len(circuit.nodes)} heads at {len(found.positions)} positions, in {len(found.rows)} of "
        f"{circuit.n_layers} layers of {circuit.n_heads} heads"
    )
    known = [abs(pill.score) for box in found.boxes for pill in box.pills if pill.score is not None]
    largest = max(known, default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{found.width:.0f}" height="{found.height:.0f}" '
        f'viewBox="0 0 {found.width:.0f} {found.height:.0f}" role="img" font-size="11" fill="{INK}" '
        f'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title or 'A circuit')}</title>",
        f"<desc>{escape(_description(circuit))}</desc>",
        f'<rect width="{found.width:.0f}" height="{found.height:.0f}" fill="white"/>',
        _text(MARGIN_LEFT, 26.0, title or "Circuit", 'font-size="15" font-weight="bold"'),
        _text(MARGIN_LEFT, 44.0, size, f'fill="{SOFT}"'),
    ]
    if not found.boxes:
        return "\n".join([*parts, _text(MARGIN_LEFT, 120.0, "No head was found: nothing to draw."), "</svg>\n"])
    parts += _frame(found)
    parts += [_outline(box) for box in found.boxes]
    parts += [_path(path, largest) for path in sorted(found.paths, key=lambda path: abs(path.pill.score or 0))]
    parts += [_logits(found)]
    parts += [_port(port, circuit, n_kv_heads) for port in found.ports if port.box is not None]
    for box in found.boxes:
        parts.append(_name(box))
        parts += [_pill(box, pill, largest, circuit, n_kv_heads) for pill in box.pills]
    parts += _legend(found, largest if known else None)
    return "\n".join([*parts, "</svg>\n"])


def _frame(found: Layout) -> list[str]:
    """Columns with the names of their positions, and layers."""
    bottom = max(box.bottom for box in found.boxes) + 12
    parts = []
    for name, (left, right) in found.positions.items():
        parts.append(
            f'<rect x="{left:.1f}" y="{MARGIN_TOP - 8:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - MARGIN_TOP + 8:.1f}" rx="6" fill="{COLUMN}"/>'
        )
        style = 'text-anchor="middle" font-size="13" font-weight="bold"'
        parts.append(_text((left + right) / 2, bottom + 19, name, style))
    right = max(right for _, right in found.positions.values())
    layers = sorted(found.rows, reverse=True)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        y = found.rows[layer]
        parts.append(f'<line x1="{MARGIN_LEFT}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(_text(MARGIN_LEFT - 10, y + 4, str(layer), f'text-anchor="end" fill="{SOFT}"'))
        if following is not None and layer - following > 1:  # layers without a head are left out
            parts.append(_text(MARGIN_LEFT - 13, (y + found.rows[following]) / 2 + 3, "⋮", f'fill="{SOFT}"'))
    middle = (found.rows[layers[0]] + found.rows[layers[-1]]) / 2
    parts.append(
        f'<text transform="translate(20 {middle:.1f}) rotate(-90)" text-anchor="middle" fill="{SOFT}">layer</text>'
    )
    parts.append(_text(MARGIN_LEFT - 10, bottom + 19, "position", f'text-anchor="end" fill="{SOFT}"'))
    return parts


def _outline(box: Box) -> str:
    return (
        f'<rect x="{box.left:.1f}" y="{box.top:.1f}" width="{box.right - box.left:.1f}" '
        f'height="{box.bottom - box.top:.1f}" rx="9" fill="white" stroke="#BBBBBB"/>'
    )


def _name(box: Box) -> str:
    """The group's name, with a halo where paths cross it, and all of its groups in the title."""
    whole = "; ".join(f"{group.name} at {group.position}{_into(group)}" for group in box.groups)
    style = 'text-anchor="middle" font-weight="bold" paint-order="stroke" stroke="white" stroke-width="3"'
    text = _text((box.left + box.right) / 2, box.top + LABEL - 3, box.name, style)
    return f"<g><title>{escape(whole)}</title>{text}</g>"


def _path(path: Path, largest: float) -> str:
    pill, port = path.pill, path.port
    colour = RAISES if pill.sign > 0 else LOWERS
    width = _width(pill.score, largest)
    dash = "" if pill.sign > 0 else f' stroke-dasharray="{max(4.0, 1.6 * width):.1f} {max(3.0, 0.9 * width):.1f}"'
    towards = {Side.LEFT: 1, Side.RIGHT: -1, Side.BOTTOM: 0}[port.side]
    x, y = (pill.x + towards * PILL_WIDTH / 2, pill.y) if path.sideways else (pill.x, pill.y - PILL_HEIGHT / 2)
    along, up = max(30.0, abs(port.x - x) / 2), max(14.0, abs(y - port.y) / 2)
    leaving = (x + towards * along, y) if path.sideways else (x, y - up)
    arriving = (port.x - towards * along, port.y) if towards else (port.x, port.y + up)
    curve = f"{leaving[0]:.1f} {leaving[1]:.1f} {arriving[0]:.1f} {arriving[1]:.1f}"
    line = f"M{x:.1f} {y:.1f}C{curve} {port.x:.1f} {port.y:.1f}"
    return (
        f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="{width:.2f}" stroke-opacity="0.5"'
        f'{dash} stroke-linecap="{"butt" if dash else "round"}"/>'
    )


def _width(score: float | None, largest: float) -> float:
    return 1.5 if score is None else THINNEST + (THICKEST - THINNEST) * abs(score) / largest


def _logits(found: Layout) -> str:
    x, y = found.logits
    return f'<rect x="{x - 34:.1f}" y="{y - 13:.1f}" width="68" height="26" rx="6" fill="{INK}"/>' + _text(
        x, y + 4, LOGITS, 'text-anchor="middle" fill="white" font-size="12" font-weight="bold"'
    )


def _port(port: Port, circuit: Circuit, n_kv_heads: int | None) -> str:
    assert port.box is not None
    component = port.component or ""
    what = f"{INPUTS.get(component, 'inputs')} of {port.box.groups[0].name}"
    if component in ("k", "v") and n_kv_heads and n_kv_heads < circuit.n_heads:
        shared = sorted({(pill.layer, _kv(pill.head, circuit, n_kv_heads)) for pill in port.box.pills})
        what += ": " + ", ".join(f"{name} of layer {layer}" for layer, name in shared)
    return (
        f'<g><title>{escape(what)}</title><circle cx="{port.x:.1f}" cy="{port.y:.1f}" r="8" fill="white" '
        f'stroke="{INK}"/>{_text(port.x, port.y + 3.5, component, _SMALL_BOLD)}</g>'
    )


_SMALL_BOLD = 'text-anchor="middle" font-size="10" font-weight="bold"'


def _kv(head: int, circuit: Circuit, n_kv_heads: int) -> str:
    """E.g. "kv head 0 (q heads 0-2)"."""
    share = circuit.n_heads // n_kv_heads
    first = head // share * share
    return f"kv head {head // share} (q heads {first}-{first + share - 1})"


def _pill(box: Box, pill: Pill, largest: float, circuit: Circuit, n_kv_heads: int | None) -> str:
    colour = RAISES if pill.sign > 0 else LOWERS
    shade = 0.12 if pill.score is None else 0.12 + 0.78 * abs(pill.score) / largest
    says = [f"head {pill.layer}.{pill.head} at {box.position}", " and ".join(group.name for group in box.groups)]
    says.append("raises the measure" if pill.sign > 0 else "lowers the measure")
    if pill.score is not None:
        says.append(f"score {pill.score:+.3f}")
    if n_kv_heads and n_kv_heads < circuit.n_heads:
        says.append(f"reads {_kv(pill.head, circuit, n_kv_heads)}")
    dash = "" if pill.sign > 0 else ' stroke-dasharray="4 2.5"'
    text = _text(
        pill.x,
        pill.y + 4,
        f"{pill.layer}.{pill.head}",
        f'text-anchor="middle" fill="{"white" if shade > 0.5 else INK}"',
    )
    return (
        f"<g><title>{escape('; '.join(says))}</title>"
        f'<rect x="{pill.x - PILL_WIDTH / 2:.1f}" y="{pill.y - PILL_HEIGHT / 2:.1f}" width="{PILL_WIDTH:.0f}" '
        f'height="{PILL_HEIGHT:.0f}" rx="{PILL_HEIGHT / 2}" fill="{_blend(colour, shade)}" stroke="{colour}" '
        f'stroke-width="1.4"{dash}/>{text}</g>'
    )


def _blend(colour: str, share: float) -> str:
    """A colour on white."""
    channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (channel - 255) * share):02X}" for channel in channels)


def _legend(found: Layout, largest: float | None) -> list[str]:
    """What colours, dashes and widths mean, below the picture."""
    y, x = found.height - 54, MARGIN_LEFT
    parts = []
    for colour, dash, says in ((RAISES, "", "raises the measure"), (LOWERS, "6 4", "lowers it")):
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}" stroke="{colour}" stroke-width="4"{dashed}/>')
        parts.append(_text(x + 38, y + 4, says))
        x += 180 if colour == RAISES else 130
    y, x = found.height - 28, MARGIN_LEFT
    if largest is None:
        return [*parts, _text(x, y + 4, "effects unknown: all lines are equally thick", f'fill="{SOFT}"')]
    for share in (1.0, 0.5, 0.1):
        width = _width(share * largest, largest)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}" stroke="{SOFT}" stroke-width="{width:.2f}"/>')
        parts.append(_text(x + 38, y + 4, f"{share * largest:.2g}"))
        x += 90
    return [*parts, _text(x, y + 4, "effect of the head alone", f'fill="{SOFT}"')]


def _description(circuit: Circuit) -> str:
    """The circuit in words, for readers who do not see it."""
    parts = []
    for group in circuit.groups:
        heads = ", ".join(f"{layer}.{head}" for layer, head in group.heads)
        parts.append(f"{group.name} at {group.position} ({heads}){_into(group)}")
    return "; ".join(parts)


def _into(group: Group) -> str:
    """What a group feeds, where that is known."""
    if group.receiver is None:
        return ""
    inputs = "" if group.component is None else f"the {INPUTS[str(group.component)]} of "
    return f", feeds {inputs}{group.receiver}"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.figures.circuit_picture", description="Draw a circuit.")
    parser.add_argument("circuit", help="a circuit as JSON")
    parser.add_argument("picture", help="the SVG file to write")
    parser.add_argument("--positions", nargs="+", help="columns from left to right")
    parser.add_argument("--kv-heads", type=int, help="key-value heads of a layer")
    parser.add_argument("--title")
    asked = parser.parse_args()
    if not File(asked.circuit).is_file():
        raise Invalid(f"circuit = '{asked.circuit}': there is no such file")
    circuit = Circuit.load(asked.circuit)
    print(picture(circuit, asked.picture, asked.positions, asked.kv_heads, asked.title))
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
