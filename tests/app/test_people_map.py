"""The map of voices: distances on the plane, and labels that stay on it and apart."""

import numpy as np

from memo_jax.app.people_map import Voice, label_places, map_html, plane


def test_directions_in_a_plane_keep_their_distances():
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, 9)
    basis = np.linalg.qr(rng.normal(size=(16, 2)))[0]
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ basis.T
    places = plane(directions * rng.uniform(0.5, 3, (9, 1)))
    np.testing.assert_allclose(
        np.linalg.norm(places[:, None] - places, axis=-1),
        np.linalg.norm(directions[:, None] - directions, axis=-1),
        atol=1e-6,
    )


def test_labels_stay_on_the_map_and_beside_their_points():
    spots = np.array([[12.0, 12.0], [88.0, 12.0], [88.0, 88.0], [50.0, 50.0], [52.0, 51.0], [12.0, 88.0]])
    places = label_places(spots, ["Katherine Johnson"] * len(spots))
    assert [side for side, _ in places[:3]] == ["right", "left", "left"]
    assert all(0 < height < 100 and abs(height - y) < 6 for (_, height), (_, y) in zip(places, spots))
    assert places[3] != places[4]


def test_equal_voices_and_names_with_markup_are_drawn():
    same = np.ones(4)
    assert "appears once there are two voices" in map_html([Voice("a", same, True)])
    drawn = map_html([Voice("<i>Ada</i>", same, True), Voice("Recording", same, False)])
    assert "&lt;i&gt;Ada&lt;/i&gt;</span>" in drawn and 'title="&lt;i&gt;Ada&lt;/i&gt;"' in drawn
    assert "nan" not in drawn and drawn.count("memo-dot") == 2
