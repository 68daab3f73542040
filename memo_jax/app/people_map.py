"""Where voices lie: embeddings of enrolled people and of the current recordings as points on a plane, in HTML."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memo_jax.scoring.metrics import unit_norm

MARGIN = 12.0  # percent of the map that stays free at each edge
# Sizes for labels, percent of a map of 320 points, a phone's: half a dot, a letter, a line, the widest label.
DOT, LETTER, LINE, WIDEST = 2.0, 2.2, 5.5, 45.0


class Voice(NamedTuple):
    """`name`; `embedding` [D]; `is_person`: whether this is somebody enrolled and not a recording on the page."""

    name: str
    embedding: np.ndarray
    is_person: bool


def plane(embeddings: np.ndarray) -> np.ndarray:
    """Returns positions [N, 2] whose distances come as near as a plane allows to those of the directions [N, D]."""
    directions = unit_norm(embeddings)
    centered = directions - directions.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    found = (left * sizes)[:, :2]
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def map_html(voices: Sequence[Voice]) -> str:
    """Returns the map; text where there is too little to show."""
    if len(voices) < 2:
        return '<p class="memo-hint">The map appears once there are two voices: people you enrol, or recordings.</p>'
    places = plane(np.stack([voice.embedding for voice in voices]))
    reach = max(float(np.abs(places).max()), 1e-6)
    spots = 50 + (50 - MARGIN) * places / reach  # percent of the map; the same scale for both axes
    points = []
    for voice, (x, y), (side, height) in zip(voices, spots, label_places(spots, [voice.name for voice in voices])):
        kind = "person" if voice.is_person else "recording"
        name = html.escape(voice.name)  # a long one ends in an ellipsis; pointing at it shows the whole
        points.append(
            f'<span class="memo-dot {kind}" title="{name}" style="left:{x:.1f}%;top:{y:.1f}%"></span>'
            f'<span class="memo-label {side}" title="{name}" style="left:{x:.1f}%;top:{height:.1f}%">{name}</span>'
        )
    return (
        f'<div class="memo-map" role="img" aria-label="map of {len(voices)} voices">{"".join(points)}</div>'
        '<p class="memo-hint"><span class="memo-key person"></span> enrolled people '
        '<span class="memo-key recording"></span> recordings on this page. Near points sound alike to the network; a '
        "plane cannot show all distances.</p>"
    )


class Box(NamedTuple):
    """A rectangle, percent of the map."""

    left: float
    right: float
    top: float
    bottom: float

    def covers(self, other: "Box") -> float:
        """Returns the area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        return max(0.0, width) * max(0.0, min(self.bottom, other.bottom) - max(self.top, other.top))

    def outside(self) -> float:
        """Returns how far the box reaches beyond the map."""
        return max(0.0, -self.left, self.right - 100) + max(0.0, -self.top, self.bottom - 100)


def label_places(spots: np.ndarray, names: Sequence[str]) -> list[tuple[str, float]]:
    """Returns ("right" or "left" of its point, height in percent) of every label, where it overlaps the others least.

    Args:
      spots: positions of the points [N, 2], percent of the map.
      names: the labels; their widths are estimated by their lengths.
    """
    taken = [Box(x - DOT, x + DOT, y - DOT, y + DOT) for x, y in spots]
    places = []
    for (x, y), name in zip(spots, names, strict=True):
        width = min(LETTER * len(name), WIDEST)
        choices = []
        for shift in (0, LINE, -LINE):
            top, bottom = y + shift - LINE / 2, y + shift + LINE / 2
            for side, start in (("right", x + DOT), ("left", x - DOT - width)):
                box = Box(start, start + width, top, bottom)
                cost = sum(map(box.covers, taken)) + 10 * box.outside() + 0.5 * abs(shift)
                choices.append((cost, len(choices), side, y + shift, box))
        _, _, side, height, box = min(choices)
        taken.append(box)
        places.append((side, height))
    return places
