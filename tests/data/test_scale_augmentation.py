"""Scales, positions and words follow the definition, and the mask is exactly the picture."""

import random

import pytest
import torch

from mlm_plugin.data.scale_augmentation import (
    LARGE_WORDS,
    MIN_SIDE,
    SMALL_WORDS,
    Scaling,
    draw_scaling,
    unscaled,
)

CANVASES = [(512, 512), (384, 640), (64, 64), (MIN_SIDE, 96)]


def _draws(canvas, count=400):
    rng = random.Random(0)
    return [draw_scaling(rng, canvas) for _ in range(count)]


@pytest.mark.parametrize("canvas", CANVASES)
def test_words_tell_the_scale(canvas):
    for scaling in _draws(canvas):
        ratios = [size / side for size, side in zip(scaling.size, canvas, strict=True)]
        if scaling.words in SMALL_WORDS:
            assert max(ratios) <= 0.6
        elif scaling.words in LARGE_WORDS:
            assert 1.2 - 0.02 <= min(ratios) <= max(ratios) <= 1.4 + 0.02
        else:
            assert scaling == unscaled(canvas)


def test_kinds_come_as_often_as_the_definition_says():
    draws = _draws((512, 512), 6000)
    small = [s for s in draws if s.words in SMALL_WORDS]
    large = [s for s in draws if s.words in LARGE_WORDS]
    # U[1/3, 1) is below 0.6 in 0.4 of the cases; it is drawn in two thirds of them
    assert len(small) / len(draws) == pytest.approx(2 / 3 * 0.4, abs=0.02)
    assert len(large) / len(draws) == pytest.approx(1 / 3, abs=0.02)
    assert {s.size[0] for s in small} == set(range(168, 304 + 1, 8))
    assert min(s.size[0] for s in large) < 620 < 710 < max(s.size[0] for s in large)
    for words, kind in ((SMALL_WORDS, small), (LARGE_WORDS, large)):
        assert {s.words for s in kind} == set(words)


@pytest.mark.parametrize("canvas", CANVASES)
def test_small_pictures_lie_on_whole_latents_and_large_ones_cover_the_canvas(canvas):
    for scaling in _draws(canvas):
        places = zip(canvas, scaling.size, (scaling.left, scaling.top), strict=True)
        for side, size, start in places:
            if scaling.words in SMALL_WORDS:
                assert size % 8 == start % 8 == 0
                assert 0 <= start <= side - size
            else:
                assert side - size <= start <= 0


@pytest.mark.parametrize("canvas", CANVASES)
def test_the_mask_is_the_picture_without_a_border_of_one_latent(canvas):
    width, height = canvas
    for scaling in _draws(canvas, 60):
        placed = scaling.place(torch.ones(1, *scaling.size[::-1]))
        mask = scaling.valid_mask()
        assert placed.shape == mask.shape == (1, height, width)
        if scaling.words not in SMALL_WORDS:
            assert placed.eq(1).all()
            assert mask.eq(1).all()
            continue
        latents = placed[0, ::8, ::8]
        neighbours = torch.nn.functional.pad(latents, (1, 1, 1, 1))
        inner = neighbours.unfold(0, 3, 1).unfold(1, 3, 1).amin((2, 3))
        expected = inner.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert mask.sum() > 0
        assert torch.equal(mask[0], expected)


def test_the_mask_is_the_papers_on_its_own_grid():
    scaling = Scaling((512, 512), (200, 200), left=40, top=96, words="very small ")
    cells = torch.zeros(64, 64)
    cells[96 // 8 + 1 : (96 + 200) // 8 - 1, 40 // 8 + 1 : (40 + 200) // 8 - 1] = 1
    assert torch.equal(scaling.valid_mask()[0, ::8, ::8], cells)
    assert torch.equal(torch.nn.functional.avg_pool2d(scaling.valid_mask(), 8)[0], cells)


def test_a_picture_is_shifted_not_changed():
    picture = torch.rand(3, 32, 24)
    placed = Scaling((64, 80), (24, 32), left=16, top=40).place(picture)
    assert torch.equal(placed[:, 40:72, 16:40], picture)
    assert placed.sum() == pytest.approx(float(picture.sum()), rel=1e-5)
    large = torch.rand(3, 100, 80)
    shown = Scaling((64, 80), (80, 100), left=-3, top=-17).place(large)
    assert torch.equal(shown, large[:, 17:97, 3:67])


@pytest.mark.parametrize(
    ("words", "caption", "expected"),
    [
        ("a far away ", "photo of a sks dog", "a far away photo of a sks dog"),
        ("a far away ", "a photo of sks dog", "a far away photo of sks dog"),
        ("very small ", "An image of a sks dog", "very small image of a sks dog"),
        ("zoomed in ", "the sks dog", "zoomed in sks dog"),
        ("close up ", "sks dog, a park", "close up sks dog, a park"),
        ("close up ", "another a b", "close up another a b"),
        ("close up ", "", ""),
        ("", "a photo of sks dog", "a photo of sks dog"),
    ],
)
def test_words_stand_before_the_caption_in_place_of_its_article(words, caption, expected):
    assert Scaling((64, 64), (64, 64), 0, 0, words).caption(caption) == expected


def test_equal_streams_give_equal_draws():
    assert _draws((384, 640)) == _draws((384, 640))
