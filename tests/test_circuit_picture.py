"""The picture of a circuit: everything is in it, nothing lies on anything else, and it stands alone."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import pytest
from conftest import REPOSITORY

from stages.circuits.circuit import Circuit, Component, Group
from stages.figures.circuit_layout import PILL_HEIGHT, PILL_WIDTH, Side, layout
from stages.figures.circuit_picture import picture
from stages.pipeline.stage import Invalid
from stages.tasks.published import GPT2_SMALL_IOI

SVG = "{http://www.w3.org/2000/svg}"
Q, K, V = Component.Q, Component.K, Component.V


def published() -> Circuit:
    return Circuit.from_heads(**GPT2_SMALL_IOI)


def wide() -> Circuit:
    """Many nodes at five positions of a model with grouped queries: many in one layer, groups of both signs, heads that
    are in two groups, two groups of the same heads."""
    return Circuit(
        (
            Group("answer", "end", "logits", None, ((23, 3), (29, 1), (23, 0), (23, 2)), (0.67, 0.29, 0.16, 0.08)),
            Group("against", "end", "logits", None, ((29, 0), (24, 4), (24, 5)), (-0.22, -0.2, -0.1), -1),
            Group("q_end", "end", "answer", Q, ((19, 1), (20, 1), (21, 7), (21, 3)), (0.3, 0.2, 0.1, 0.03)),
            Group("q_end>against", "end", "against", Q, ((19, 1), (20, 1), (21, 7), (21, 3)), (0.1, 0.2, 0.1, 0.03)),
            Group("beside", "end", "answer", Q, ((22, 1), (25, 2), (25, 3), (26, 3)), (0.05, 0.02, 0.02, 0.02)),
            Group("k_io", "io", "answer", K, ((12, 1), (11, 4), (16, 2)), (0.12, 0.05, 0.02)),
            Group("v_io", "io", "answer", V, ((12, 1), (13, 1)), (0.12, 0.05)),
            Group("k_s2", "s2", "answer", K, tuple((17, head) for head in range(9)), tuple(0.1 for _ in range(9))),
            Group("v_s2>q_end", "s2", "q_end", V, ((17, 4), (15, 7), (18, 1), (8, 1)), (0.31, 0.2, 0.15, 0.1)),
            Group("a_name_that_is_far_too_long_to_be_written_out", "s1+1", "k_s2", V, ((16, 0), (10, 2)), (0.4, 0.2)),
            Group("k_s1", "s1", "k_s2", K, ((2, 0), (0, 2), (5, 2), (4, 1), (3, 8), (6, 6), (7, 7)), (0.4,) * 7),
        ),
        30,
        9,
    )


@pytest.mark.parametrize("circuit", [published(), wide()], ids=["26 nodes", "40 nodes"])
def test_everything_is_in_it_and_nothing_overlaps(circuit: Circuit) -> None:
    assert len(circuit.nodes) in (26, 40)
    found = layout(circuit)
    nodes = {(pill.layer, pill.head, box.position) for box in found.boxes for pill in box.pills}
    assert nodes == {(node.layer, node.head, node.position) for node in circuit.nodes}
    rectangles = [(box.left, box.top, box.right, box.bottom) for box in found.boxes]
    pills = [
        (pill.x - PILL_WIDTH / 2, pill.y - PILL_HEIGHT / 2, pill.x + PILL_WIDTH / 2, pill.y + PILL_HEIGHT / 2)
        for box in found.boxes
        for pill in box.pills
    ]
    for kind in (rectangles, pills):
        for one, other in combinations(kind, 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)
    for box in found.boxes:
        left, right = found.positions[box.position]
        assert left < box.left and box.right < right and 0 < box.top and box.bottom < found.height
        assert all(box.left < pill.x - PILL_WIDTH / 2 and pill.x + PILL_WIDTH / 2 < box.right for pill in box.pills)
        assert all(box.top < pill.y - PILL_HEIGHT / 2 and pill.y + PILL_HEIGHT / 2 < box.bottom for pill in box.pills)
    assert max(right for _, right in found.positions.values()) <= found.width
    # higher layers are higher, and paths from another position, or from beside, go up
    rows = sorted(found.rows, reverse=True)
    assert [found.rows[layer] for layer in rows] == sorted(found.rows.values())
    assert all(path.port.y <= path.pill.y + PILL_HEIGHT for path in found.paths)
    for box in found.boxes:
        for group in box.groups:
            paths = [path for path in found.paths if path.group is group]
            assert len(paths) == len(group.heads)
            receivers = {None if path.port.box is None else path.port.box.groups[0].name for path in paths}
            assert receivers == {None if group.receiver == "logits" else group.receiver}
    at_bottom = [path for path in found.paths if path.port.box is not None and path.port.side == Side.BOTTOM]
    assert at_bottom and all(path.port.box.position == path.group.position for path in at_bottom if path.port.box)


@pytest.mark.parametrize("circuit", [published(), wide()], ids=["26 nodes", "40 nodes"])
def test_it_stands_alone_and_says_what_is_known(circuit: Circuit, tmp_path: Path) -> None:
    file = picture(circuit, tmp_path / "a.svg", title="IOI <&> more")
    assert file.read_bytes() == picture(circuit, tmp_path / "b.svg", title="IOI <&> more").read_bytes()
    root = ET.parse(file).getroot()
    used = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert used <= {"svg", "title", "desc", "rect", "line", "text", "g", "circle", "path"}  # no script, no image
    assert not [name for element in root.iter() for name in element.attrib if "href" in name or name.startswith("on")]
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert titles[0] == "IOI <&> more" and "IOI <&> more" in texts
    for node in circuit.nodes:
        head = f"{node.layer}.{node.head}"
        assert head in texts
        (group,) = [group for group in circuit.groups if node in group.nodes][:1]
        (said,) = [title for title in titles if title.startswith(f"head {head} at {node.position}; ")][:1]
        assert group.name in said and ("raises" if group.sign > 0 else "lowers") in said
        if group.scores:
            assert f"score {group.scores[group.heads.index((node.layer, node.head))]:+.3f}" in said
    for position in {node.position for node in circuit.nodes}:
        assert position in texts
    lowered = [path for path in root.iter(f"{SVG}path") if path.attrib["stroke"] == "#D55E00"]
    raised = [path for path in root.iter(f"{SVG}path") if path.attrib["stroke"] == "#0072B2"]
    assert len(lowered) == sum(len(group.heads) for group in circuit.groups if group.sign < 0)
    assert len(lowered) + len(raised) == sum(len(group.heads) for group in circuit.groups)
    assert all("stroke-dasharray" in path.attrib for path in lowered)
    assert not any("stroke-dasharray" in path.attrib for path in raised)


def test_widths_are_effects_and_key_value_heads_are_named(tmp_path: Path) -> None:
    root = ET.parse(picture(wide(), tmp_path / "a.svg", n_kv_heads=3)).getroot()
    widths = sorted({float(path.attrib["stroke-width"]) for path in root.iter(f"{SVG}path")})
    scores = sorted({abs(score) for group in wide().groups for score in group.scores})
    assert len(widths) == len(scores)
    for width, score in zip(widths, scores, strict=True):
        assert width == pytest.approx(1 + 8 * score / scores[-1], abs=0.006)
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    assert any(title.startswith("head 17.4 at s2") and "reads kv head 1 (q heads 3-5)" in title for title in titles)
    (port,) = [title for title in titles if title.startswith("keys of answer")]
    assert "kv head 0 (q heads 0-2) of layer 23, " in port and "kv head 1 (q heads 3-5) of layer 23" in port
    with pytest.raises(Invalid, match="n_kv_heads = 2: must divide the 9 heads of a layer"):
        picture(wide(), tmp_path / "b.svg", n_kv_heads=2)


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    assert list(layout(published()).positions) == ["s1+1", "s2", "end"]
    assert list(layout(published(), ["io", "s2", "s1+1", "end"]).positions) == ["s2", "s1+1", "end"]
    with pytest.raises(Invalid, match=r"positions \['s2'\] lack end, s1\+1: must name all of the circuit's"):
        picture(published(), tmp_path / "a.svg", positions=["s2"])


def test_circuits_with_little_in_them(tmp_path: Path) -> None:
    empty = ET.parse(picture(Circuit((), 6, 8, identifiable=False), tmp_path / "a.svg")).getroot()
    assert "No head was found: nothing to draw." in [element.text for element in empty.iter(f"{SVG}text")]
    unknown = Circuit.from_heads({"some": ["3.1", "L2H0"]}, "end", 6, 8)  # nobody knows what they feed
    root = ET.parse(picture(unknown, tmp_path / "b.svg")).getroot()
    assert not list(root.iter(f"{SVG}path"))
    assert {"3.1", "2.0"} <= {element.text for element in root.iter(f"{SVG}text")}


def test_the_command_draws_a_saved_circuit(tmp_path: Path) -> None:
    published().save(tmp_path / "circuit.json")
    command = [sys.executable, "-m", "stages.figures.circuit_picture"]
    arguments = [str(tmp_path / "circuit.json"), str(tmp_path / "out.svg"), "--title", "IOI"]
    result = subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'out.svg'}\n"), result.stderr
    picture(published(), tmp_path / "expected.svg", title="IOI")
    assert (tmp_path / "out.svg").read_bytes() == (tmp_path / "expected.svg").read_bytes()
    (tmp_path / "other.json").write_text("[1]")
    for name, said in (("none.json", "there is no such file"), ("other.json", "holds no circuit")):
        result = subprocess.run(
            [*command, str(tmp_path / name), "x.svg"], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1


def test_the_published_circuit_is_that_of_the_paper() -> None:
    circuit = published()
    assert len(circuit.nodes) == 26 and len(circuit.groups) == 7
    sizes = {group.name: len(group.heads) for group in circuit.groups}
    assert sizes["name mover"] == 3 and sizes["backup name mover"] == 8 and sizes["S-inhibition"] == 4
    assert [group.name for group in circuit.groups if group.sign < 0] == ["negative name mover"]
