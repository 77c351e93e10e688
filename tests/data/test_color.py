"""ICC profiles: pictures train with the colours that a viewer shows."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mlm_plugin.data import images
from mlm_plugin.data.color import profile_of

sys.path.insert(0, str(Path(__file__).parent))
import icc

CASE = Path(__file__).parents[3] / "shared" / "cases" / "icc_adobe.png"


@pytest.fixture
def colours():
    """Every kind of colour in one picture."""
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def through_image_cms(picture, data):
    """The reference: Little CMS, perceptual, to sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(data))
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB"))


def difference(first, second):
    return np.abs(first.astype(int) - second.astype(int)).max()


@pytest.mark.parametrize(
    ("mode", "data", "suffix"),
    [
        ("RGB", icc.wide_rgb(), "png"),
        ("RGB", icc.wide_rgb(), "tif"),
        ("L", icc.grey(), "png"),
        ("CMYK", icc.cmyk(), "tif"),
    ],
)
def test_a_profile_is_converted_to_srgb(tmp_path, colours, mode, data, suffix):
    picture = Image.fromarray(colours).convert(mode)
    path = tmp_path / f"a.{suffix}"
    picture.save(path, icc_profile=data)
    found = images.open_image(path)
    wanted = through_image_cms(picture, data)
    assert difference(found, wanted) <= 2
    assert difference(found, np.asarray(picture.convert("RGB"))) > 20  # it matters
    assert images.inspect_image(path).profile.is_converted


def test_transparency_and_palettes_keep_theirs(tmp_path, colours):
    alpha = np.full((24, 32, 1), 77, np.uint8)
    picture = Image.fromarray(np.concatenate([colours, alpha], axis=2))
    picture.save(tmp_path / "a.png", icc_profile=icc.wide_rgb())
    found = images.open_image(tmp_path / "a.png", alpha=True)
    wanted = through_image_cms(Image.fromarray(colours), icc.wide_rgb())
    assert difference(found[:, :, :3], wanted) <= 2
    assert (found[:, :, 3] == 77).all()
    few = Image.fromarray(colours).quantize(16)
    few.save(tmp_path / "p.png", icc_profile=icc.wide_rgb())
    wanted = through_image_cms(few.convert("RGB"), icc.wide_rgb())
    assert difference(images.open_image(tmp_path / "p.png"), wanted) <= 2


def test_a_16_bit_grey_is_converted_too(tmp_path):
    values = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    Image.fromarray(values).save(tmp_path / "a.tif", icc_profile=icc.grey())
    found = images.open_image(tmp_path / "a.tif")
    eight_bit = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    assert difference(found, through_image_cms(eight_bit, icc.grey())) <= 2


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        ("RGB", None),
        ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("RGB", b"not a profile"),
        ("RGB", icc.wide_rgb()[:200]),
        ("RGB", icc.cmyk()),
        ("L", icc.wide_rgb()),
    ],
    ids=["none", "srgb", "text", "cut off", "of another kind", "of another kind too"],
)
def test_without_a_usable_profile_the_bytes_stay(tmp_path, colours, mode, data):
    picture = Image.fromarray(colours).convert(mode)
    picture.save(tmp_path / "a.png", **({} if data is None else {"icc_profile": data}))
    found = images.open_image(tmp_path / "a.png")
    assert difference(found, np.asarray(picture.convert("RGB"))) == 0
    assert not images.inspect_image(tmp_path / "a.png").profile.is_converted


def test_the_values_of_a_mask_are_no_colours(tmp_path, colours):
    picture = Image.fromarray(colours[:, :, 0])
    picture.save(tmp_path / "mask.png", icc_profile=icc.grey())
    assert difference(images.open_mask(tmp_path / "mask.png")[:, :, 0], colours[:, :, 0]) == 0


def test_the_name_of_the_profile_is_told(tmp_path, colours):
    picture = Image.fromarray(colours)
    picture.save(tmp_path / "a.png", icc_profile=icc.wide_rgb("Display P3"))
    with Image.open(tmp_path / "a.png") as opened:
        assert profile_of(opened).name == "Display P3"


@pytest.mark.skipif(not CASE.is_file(), reason="the seen cases (shared/cases) are not here")
def test_the_seen_picture():
    with Image.open(CASE) as opened:
        wanted = through_image_cms(opened.convert("RGB"), opened.info["icc_profile"])
    assert difference(images.open_image(CASE), wanted) <= 2
