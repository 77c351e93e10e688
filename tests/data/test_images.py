"""Pictures: odd files come out upright, 8-bit and RGB; scaling, cropping and colours."""

import importlib.util
import random
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlm_plugin.data import images


@pytest.fixture
def picture():
    """Left red, right blue, with a green stripe on top: every flip and turn shows."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32, 0] = 255
    pixels[:, 32:, 2] = 255
    pixels[:8] = (0, 255, 0)
    return Image.fromarray(pixels)


def _is_close(pixels, picture, tolerance=3):
    return np.abs(pixels.astype(int) - np.asarray(picture).astype(int)).mean() < tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path, picture, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(undo[orientation]) if orientation > 1 else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert images.inspect_image(tmp_path / "a.png").size == (64, 48)
    assert _is_close(images.open_image(tmp_path / "a.png"), picture)


def test_a_rotated_photo_with_a_damaged_tag_is_turned_all_the_same(tmp_path, picture):
    resolution_as_text = struct.pack("<HHI4s", 0x011A, 2, 2, b"x")
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tags = struct.pack("<H", 2) + orientation + resolution_as_text + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags
    stored = picture.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    with pytest.raises((struct.error, TypeError)):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert images.inspect_image(tmp_path / "a.jpg").size == (64, 48)
    assert _is_close(images.open_image(tmp_path / "a.jpg"), picture, tolerance=6)


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path, picture):
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert _is_close(images.open_image(tmp_path / "a.jpg"), picture, tolerance=6)


def test_a_16_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    pixels = images.open_image(tmp_path / "a.png")
    assert pixels.shape == (48, 64, 3)
    np.testing.assert_allclose(pixels[:, :, 0], ramp / 257, atol=1)


def test_a_float_picture_is_scaled(tmp_path):
    ramp = np.linspace(0, 1, 64 * 48).reshape(48, 64).astype(np.float32)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    np.testing.assert_allclose(images.open_image(tmp_path / "a.tif")[:, :, 2], ramp * 255, atol=1)


def test_an_animated_file_gives_its_first_frame(tmp_path, picture):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("white", "black")]
    picture.save(tmp_path / "a.gif", save_all=True, append_images=frames)
    assert images.inspect_image(tmp_path / "a.gif").num_frames == 3
    assert _is_close(images.open_image(tmp_path / "a.gif"), picture)


def _with_hole(picture):
    picture = picture.convert("RGBA")
    alpha = np.full((48, 64), 255, np.uint8)
    alpha[24:] = 0
    picture.putalpha(Image.fromarray(alpha))
    return picture


@pytest.mark.parametrize("kind", ["rgba", "palette", "grey and alpha"])
def test_transparency_shows_white_and_is_kept_on_request(tmp_path, picture, kind):
    stored = _with_hole(picture)
    if kind == "palette":
        stored = stored.quantize(16)
    elif kind == "grey and alpha":
        stored = stored.convert("LA")
    stored.save(tmp_path / "a.png")
    assert images.inspect_image(tmp_path / "a.png").has_alpha
    plain = images.open_image(tmp_path / "a.png")
    assert plain.shape == (48, 64, 3)
    assert (plain[24:] == 255).all()
    assert (plain[:24] != 255).any()
    alpha = images.open_image(tmp_path / "a.png", alpha=True)[:, :, 3]
    assert (alpha[:24] == 255).all()
    assert (alpha[24:] == 0).all()


def test_palette_transparency_by_index_is_seen(tmp_path):
    indices = np.zeros((8, 8), np.uint8)
    indices[4:] = 1
    stored = Image.fromarray(indices, "P")
    stored.putpalette([255, 0, 0, 0, 0, 255])
    stored.save(tmp_path / "a.png", transparency=1)
    pixels = images.open_image(tmp_path / "a.png")
    assert (pixels[:4] == (255, 0, 0)).all()
    assert (pixels[4:] == 255).all()


def test_an_opaque_file_gets_a_full_alpha_channel(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    pixels = images.open_image(tmp_path / "a.png", alpha=True)
    assert (pixels[:, :, 3] == 255).all()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "gif"])
def test_a_file_that_was_cut_short_is_found(tmp_path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{extension}"
    Image.fromarray(noise).save(path)
    images.inspect_image(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"\w"):
        images.inspect_image(path)


def test_files_that_are_no_pictures_are_found(tmp_path):
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"\w"):
            images.inspect_image(tmp_path / "a.png")


def test_listing_takes_pictures_in_order_and_nothing_else(tmp_path):
    for name in ("b.PNG", "a.jpeg", "._a.jpeg", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    names = [path.name for path in images.list_images(tmp_path)]
    assert names == ["a.jpeg", "b.PNG", "c.webp"]


def test_shrinking_averages_areas_exactly():
    # Values of cv2.resize(..., interpolation=cv2.INTER_AREA), OpenCV 5.0: each output pixel is
    # the mean of the 5/3 input pixels under it.
    row = np.array([0, 60, 120, 180, 240], np.uint8)
    pixels = np.tile(row[None, :, None], (5, 1, 3))
    shrunk = images.resize_image(pixels, (3, 3))
    assert shrunk[0, :, 0].tolist() == [24, 120, 216]
    assert (shrunk == shrunk[0]).all()


def test_shrinking_keeps_the_mean_and_whole_factors_are_block_means():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    halves = images.resize_image(pixels, (45, 30))
    blocks = pixels.reshape(30, 2, 45, 2, 3).mean((1, 3))
    assert np.abs(halves - blocks).max() <= 0.5
    odd = images.resize_image(pixels, (37, 41))
    assert odd.shape == (41, 37, 3)
    np.testing.assert_allclose(odd.mean((0, 1)), pixels.mean((0, 1)), atol=0.3)


def test_enlarging_uses_lanczos_and_names_choose_the_filter(picture):
    pixels = np.asarray(picture)
    lanczos = np.asarray(picture.resize((100, 100), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(images.resize_image(pixels, (100, 100)), lanczos)
    nearest = images.resize_image(pixels, (100, 100), interpolation="nearest")
    assert {tuple(p) for p in nearest.reshape(-1, 3)} == {tuple(p) for p in pixels.reshape(-1, 3)}
    for name in images.RESIZE_INTERPOLATIONS:
        assert images.resize_image(pixels, (32, 70), interpolation=name).shape == (70, 32, 3)


def test_the_crop_is_in_the_middle_or_anywhere():
    pixels = np.arange(10)[None, :, None].repeat(4, 0).astype(np.uint8)
    assert images.crop(pixels, (4, 4))[0, :, 0].tolist() == [3, 4, 5, 6]
    rng = random.Random(0)
    starts = {int(images.crop(pixels, (4, 4), rng=rng)[0, 0, 0]) for _ in range(200)}
    assert starts == set(range(7))


def test_colour_changes_are_small_rare_and_leave_greys_their_hue():
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grey = np.full((4, 4, 3), 100, np.uint8)
    rng = random.Random(0)
    changed = sum(
        not np.array_equal(images.color_augment(photo, rng=rng), photo) for _ in range(900)
    )
    assert 0.25 < changed / 900 < 0.4
    for _ in range(100):
        result = images.color_augment(grey, rng=rng).astype(int)
        assert np.ptp(result, axis=2).max() == 0
        assert np.abs(result - 100).max() < 8


def test_tensors_run_from_minus_one_to_one():
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    tensor = images.image_tensor(pixels[:, ::-1])
    assert tensor.shape == (3, 1, 1)
    np.testing.assert_allclose(tensor.flatten(), [-1, 1, -0.6], atol=1e-6)


@pytest.mark.parametrize("size", [(11_000, 11_000), (16_000, 12_000)])
def test_the_picture_of_a_phone_of_200_megapixels_is_read(tmp_path, size, recwarn):
    Image.new("L", size).save(tmp_path / "a.png")
    assert images.inspect_image(tmp_path / "a.png").size == size
    assert images.open_image(tmp_path / "a.png").shape == (*size[::-1], 3)
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


def test_large_pictures_are_read_in_several_threads(tmp_path):
    """Pillow's limit is one for the whole process, and is as before afterwards."""
    paths = [tmp_path / f"{number}.png" for number in range(12)]
    for path in paths:
        Image.new("L", (200, 100)).save(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1000
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(20):
                assert len(list(pool.map(images.inspect_image, paths))) == 12
        assert Image.MAX_IMAGE_PIXELS == 1000
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_a_picture_beyond_the_limit_is_named_with_a_remedy(tmp_path, monkeypatch):
    Image.new("L", (400, 300)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    limit = Image.MAX_IMAGE_PIXELS
    for read in (images.inspect_image, images.open_image):
        with pytest.raises(ValueError, match="400 x 300 is more than .* save a smaller copy"):
            read(tmp_path / "a.png")
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.heic", "pillow_heif", "pillow-heif"),
        ("a.HEIF", "pillow_heif", "pillow-heif"),
        ("a.jxl", "pillow_jxl", "pillow-jxl-plugin"),
    ],
)
def test_a_format_that_needs_a_package_names_it(tmp_path, name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / name).write_bytes(b"not known to Pillow")
    with pytest.raises(ValueError, match=f"need the package {package}: pip install {package}"):
        images.inspect_image(tmp_path / name)


@pytest.mark.parametrize(("module", "suffix"), [("pillow_heif", ".heic"), ("pillow_jxl", ".jxl")])
def test_with_the_package_the_format_is_read(tmp_path, picture, module, suffix):
    plugin = pytest.importorskip(module)
    if suffix == ".heic":
        plugin.register_heif_opener()
    picture.save(tmp_path / f"a{suffix}", quality=95)
    assert images.inspect_image(tmp_path / f"a{suffix}").size == (64, 48)
    assert _is_close(images.open_image(tmp_path / f"a{suffix}"), picture, tolerance=12)
