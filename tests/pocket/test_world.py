"""The world is exact: same scene, same picture; captions say what their labels say."""

from dataclasses import replace

import numpy as np
import pytest

from mlm_plugin.pocket.captions import (
    BACKGROUND_PHRASES,
    POSITION_PHRASES,
    RARE_WORDS,
    all_words,
    caption_scene,
    draw_said,
    write_caption,
)
from mlm_plugin.pocket.sprites import COMPANIONS, HATS, SUBJECTS
from mlm_plugin.pocket.world import (
    ATTRIBUTES,
    COLOURS,
    NO_COMPANION,
    Paint,
    Scene,
    draw_scene,
    held_out_pairs,
    is_held_out,
    labels,
    render,
    render_art,
    things_in,
)

CAT = Scene("cat", "red", "plain", "large", "middle", "beach", seed=3)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_same_scene_gives_the_same_picture(rng):
    for _ in range(50):
        scene = draw_scene(rng, held_out=None)
        picture = render(scene)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, render(scene))


def test_every_art_pixel_is_doubled():
    np.testing.assert_array_equal(render(CAT)[::2, 1::2], render_art(CAT))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_value_of_an_attribute_changes_the_picture(attribute):
    pictures = {
        render_art(replace(CAT, **{attribute: value})).tobytes() for value in ATTRIBUTES[attribute]
    }
    assert len(pictures) == len(ATTRIBUTES[attribute])


def test_the_world_is_as_large_as_promised():
    assert len(ATTRIBUTES["subject"]) >= 8
    assert len(ATTRIBUTES["colour"]) >= 8
    assert len(ATTRIBUTES["background"]) >= 8


@pytest.mark.parametrize("subject", SUBJECTS["large"])
@pytest.mark.parametrize("companion", [*HATS, *COMPANIONS])
@pytest.mark.parametrize("position", ["left", "middle", "right"])
def test_nothing_leaves_the_picture(subject, companion, position):
    for size in SUBJECTS:
        for seed in range(9):
            render_art(Scene(subject, "red", "plain", size, position, "snow", companion, seed=seed))


def test_large_and_small_hold_the_same_subjects():
    assert list(SUBJECTS["large"]) == list(SUBJECTS["small"])


def test_positions_are_where_they_say():
    columns = []
    for position in ("left", "middle", "right"):
        plain = replace(CAT, position=position, size="small")
        other = replace(plain, paint=Paint((1, 2, 3), (4, 5, 6)))
        changed = (render_art(plain) != render_art(other)).any(axis=(0, 2))
        columns.append(np.nonzero(changed)[0].mean())
    assert columns[0] < 12 < columns[1] < 20 < columns[2]


@pytest.mark.parametrize("background", ATTRIBUTES["background"])
def test_objects_are_distinguished_from_the_background(background, rng):
    scene = draw_scene(rng, background=background, position="left", companion=NO_COMPANION)
    art = render_art(scene)
    things = things_in(scene, art)
    assert 20 < things.sum() < 400  # art pixels of 1024
    assert not things[:, 26:].any()
    recoloured = render_art(replace(scene, paint=Paint((1, 2, 3), (4, 5, 6))))
    assert np.array_equal(recoloured[~things], art[~things])


def test_a_drawn_scene_is_held_out_only_where_asked(rng):
    assert not any(is_held_out(draw_scene(rng)) for _ in range(300))
    assert all(is_held_out(draw_scene(rng, held_out=True)) for _ in range(100))


def test_every_value_is_seen_in_building(rng):
    scenes = [draw_scene(rng) for _ in range(1500)]
    for attribute, values in ATTRIBUTES.items():
        assert {getattr(scene, attribute) for scene in scenes} == set(values)


def test_fixed_attributes_stay(rng):
    assert all(draw_scene(rng, subject="dog").subject == "dog" for _ in range(20))


def test_an_unnamed_colour_has_no_label():
    painted = replace(CAT, paint=Paint((10, 200, 190), (250, 120, 0)))
    assert labels(painted)["colour"] == -100
    assert labels(CAT)["colour"] == list(COLOURS).index("red")
    assert "colour" not in draw_said(painted, np.random.default_rng(1))


def test_a_caption_says_only_what_the_scene_shows(rng):
    for _ in range(300):
        scene = draw_scene(rng, held_out=None)
        caption = caption_scene(scene, rng)
        assert all(getattr(scene, name) == value for name, value in caption.said.items())
        assert scene.subject in caption.text
        assert NO_COMPANION not in caption.text.split()


def test_a_caption_says_what_its_labels_say_and_nothing_else(rng):
    for _ in range(300):
        caption = caption_scene(draw_scene(rng, held_out=None), rng)
        words = caption.text.replace(",", "").replace(str(caption.said.get("companion")), "")
        assert set(words.split()) & set(COLOURS) == {caption.said.get("colour")} - {None}
        for table, name in ((BACKGROUND_PHRASES, "background"), (POSITION_PHRASES, "position")):
            for value, phrases in table.items():
                if any(caption.text.endswith(phrase) for phrase in phrases):
                    assert caption.said[name] == value


def test_labels_of_a_caption_are_those_of_its_scene_or_ignored(rng):
    for _ in range(100):
        scene = draw_scene(rng)
        said, shown = caption_scene(scene, rng).labels(), labels(scene)
        assert all(said[name] in (-100, shown[name]) for name in ATTRIBUTES)


def test_a_caption_can_name_a_concept(rng):
    texts = [write_caption({"subject": "dog"}, rng, subject="sks dog").text for _ in range(20)]
    assert all("sks dog" in text for text in texts)


def test_captions_vary(rng):
    said = {"subject": "cat", "background": "snow", "companion": "crown"}
    assert len({write_caption(said, rng).text for _ in range(200)}) > 40


def test_every_word_of_a_caption_is_listed(rng):
    known = all_words()
    assert set(RARE_WORDS) <= known
    for _ in range(500):
        text = caption_scene(draw_scene(rng), rng).text
        assert set(text.replace(",", "").split()) <= known


def test_held_out_pairs_are_named_by_attribute():
    pairs = held_out_pairs({"subject": "cat", "background": "mountains", "colour": "red"})
    assert pairs == [("subject", "background")]
