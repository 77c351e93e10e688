"""Batches: what is in them, that they can be repeated, and what is refused."""

import json
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.data.captions import process_caption
from mlm_plugin.data.dataset import BatchKey, EpochOrder, TrainDataset, make_loader
from mlm_plugin.data.images import image_tensor, open_image
from mlm_plugin.errors import UserError

SIZE = 64


def _pictures(folder, *names, size=(SIZE, SIZE)):
    """Pictures whose left half is darker than the right, each of its own shade."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shade = sum(name.encode()) % 100 + 20
        pixels = np.full((size[1], size[0], 3), shade, np.uint8)
        pixels[:, size[0] // 2 :] += 100
        Image.fromarray(pixels).save(folder / name)
    return folder


def _config(*subsets, batch_size=2, **settings):
    return DatasetConfig(
        batch_size=batch_size,
        resolution=(SIZE, SIZE),
        subsets=subsets,
        **{"min_bucket_reso": 32, "max_bucket_reso": 256, "bucket_reso_steps": 32} | settings,
    )


def _dataset(*configs, seed=0, **settings):
    return TrainDataset(configs, seed=seed, **settings)


FIRST, SECOND = BatchKey(0, 0), BatchKey(0, 1)


def _epoch(dataset, epoch):
    return [dataset[BatchKey(epoch, i)] for i in range(len(dataset))]


def _names(batches):
    return [Path(path).name for batch in batches for path in batch.image_paths]


def _same(one, other):
    return one.captions == other.captions and torch.equal(one.pixel_values, other.pixel_values)


@pytest.fixture
def folder(tmp_path):
    return _pictures(tmp_path / "3_sks dog", *(f"{i}.png" for i in range(5)))


def test_every_picture_comes_as_often_as_its_repeats(folder):
    dataset = _dataset(_config(SubsetConfig(image_dir=folder, num_repeats=3)))
    assert len(dataset) == 8
    assert dataset.num_train_images == 15
    for epoch in (0, 1):
        assert Counter(_names(_epoch(dataset, epoch))) == {f"{i}.png": 3 for i in range(5)}


def test_a_batch_holds_pictures_weights_captions_and_sizes(folder):
    (folder / "0.txt").write_text("a photo of sks dog")
    subset = SubsetConfig(
        image_dir=folder,
        class_tokens="sks dog",
        caption_extension=".txt",
        custom_attributes={"who": "me"},
    )
    batch = _dataset(_config(subset, batch_size=5))[FIRST]
    assert batch.pixel_values.shape == (5, 3, SIZE, SIZE)
    assert batch.pixel_values.dtype == torch.float32
    assert batch.latents is None
    assert batch.loss_masks is None
    assert batch.loss_weights.tolist() == [1.0] * 5
    assert sorted(batch.captions) == ["a photo of sks dog"] + ["sks dog"] * 4
    assert batch.original_sizes == batch.target_sizes == [(SIZE, SIZE)] * 5
    assert batch.custom_attributes == [{"who": "me"}] * 5


def test_batches_mix_neither_buckets_nor_data_sets(tmp_path):
    for index in range(2):
        _pictures(tmp_path / f"{index}", "a.png", "b.png", "c.png")
        _pictures(tmp_path / f"{index}", "wide1.png", "wide2.png", size=(3 * SIZE, SIZE))
    dataset = _dataset(
        _config(SubsetConfig(image_dir=tmp_path / "0"), batch_size=2, enable_bucket=True),
        _config(SubsetConfig(image_dir=tmp_path / "1"), batch_size=3, enable_bucket=True),
    )
    sizes = Counter()
    for batch in _epoch(dataset, 0):
        parents = {Path(path).parent.name for path in batch.image_paths}
        wide = {"wide" in Path(path).name for path in batch.image_paths}
        assert len(parents) == len(wide) == 1
        sizes[parents.pop(), tuple(batch.pixel_values.shape[2:]), len(batch.captions)] += 1
    assert sizes == {
        ("0", (64, 64), 2): 1,
        ("0", (64, 64), 1): 1,
        ("0", (32, 96), 2): 1,
        ("1", (64, 64), 3): 1,
        ("1", (32, 96), 2): 1,
    }


def test_equal_seed_epoch_and_number_give_the_same_batch(folder):
    subset = SubsetConfig(
        image_dir=folder, class_tokens="a, b, c, d", shuffle_caption=True, flip_aug=True
    )
    first, second = _dataset(_config(subset)), _dataset(_config(subset))
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    # Asked in another order, as after a resume or by another worker.
    for index in (2, 0, 1):
        assert _same(first[BatchKey(3, index)], second[BatchKey(3, index)])
    assert state == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_epochs_and_seeds_differ(folder):
    config = _config(SubsetConfig(image_dir=folder, num_repeats=4))
    orders = [_names(_epoch(_dataset(config, seed=s), e)) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_workers_see_the_same_batches_epoch_after_epoch(folder):
    subset = SubsetConfig(
        image_dir=folder,
        class_tokens="a, b, c, d, e, f",
        shuffle_caption=True,
        flip_aug=True,
        token_warmup_step=4,
    )
    dataset = _dataset(_config(subset))
    plain, forked = EpochOrder(dataset), EpochOrder(dataset)
    here = make_loader(plain)
    there = make_loader(forked, num_workers=2, persistent_workers=True)
    state = torch.get_rng_state()
    for epoch in range(2):
        for order in (plain, forked):
            order.start_epoch(epoch, step=3 * epoch)
        pairs = list(zip(here, there, strict=True))
        assert len(pairs) == 3
        assert all(_same(a, b) for a, b in pairs)
    assert torch.equal(state, torch.get_rng_state())


def test_every_tensor_of_a_batch_can_be_page_locked(folder, monkeypatch):
    batch = _dataset(_config(SubsetConfig(image_dir=folder, flip_aug=True)))[FIRST]
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # a CPU has no such memory
    pinned = batch.pin_memory()
    assert _same(pinned, batch)
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {"pixel_values", "loss_weights"} <= tensors
    assert all(getattr(pinned, name) is not getattr(batch, name) for name in tensors)


def test_a_data_set_can_be_pickled(folder):
    dataset = _dataset(_config(SubsetConfig(image_dir=folder, flip_aug=True)))
    assert _same(pickle.loads(pickle.dumps(dataset))[SECOND], dataset[SECOND])


def test_an_order_can_begin_in_the_middle(folder):
    order = EpochOrder(_dataset(_config(SubsetConfig(image_dir=folder, num_repeats=2))))
    order.start_epoch(4, step=10)
    whole = list(order)
    assert whole == [BatchKey(4, i, 10 + i) for i in range(5)]
    order.start_epoch(4, skip=3, step=13)
    assert list(order) == whole[3:]
    assert len(order) == 2


def test_processes_share_an_epoch_in_equal_parts(folder):
    dataset = _dataset(_config(SubsetConfig(image_dir=folder, num_repeats=2)))
    parts = [list(EpochOrder(dataset, rank=r, world_size=2, batches_per_step=2)) for r in range(2)]
    assert [[key.index for key in part] for part in parts] == [[0, 2, 4], [1, 3, 0]]
    assert [key.step for key in parts[0]] == [0, 0, 1]


def test_flips_happen_to_half_of_the_pictures(folder):
    dataset = _dataset(_config(SubsetConfig(image_dir=folder, num_repeats=40, flip_aug=True)))
    mirrored = [
        bool(picture[0, 0, 0] > picture[0, 0, -1])
        for batch in _epoch(dataset, 0)
        for picture in batch.pixel_values
    ]
    assert 70 < sum(mirrored) < 130


def test_random_crops_without_buckets_are_cut_at_full_size(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    ramp = np.arange(200, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2)
    Image.fromarray(ramp).save(folder / "a.png")
    subset = SubsetConfig(image_dir=folder, random_crop=True, num_repeats=50)
    rows = [
        ((picture[0, 0] + 1) * 127.5).round()
        for batch in _epoch(_dataset(_config(subset)), 0)
        for picture in batch.pixel_values
    ]
    assert all((row.diff() == 1).all() for row in rows)
    assert len({int(row[0]) for row in rows}) > 20


def test_pictures_are_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    _pictures(tmp_path, "a.png", size=(256, 128))
    batch = _dataset(_config(SubsetConfig(image_dir=tmp_path)))[FIRST]
    assert batch.pixel_values.shape == (1, 3, SIZE, SIZE)
    row = batch.pixel_values[0, 0, 0]
    assert (row[:32] == row[0]).all()
    assert (row[32:] == row[-1]).all()
    assert batch.original_sizes == [(128, 256)]
    assert batch.crop_top_lefts == [(16, 0)]


def test_regularisation_images_fill_up_to_the_training_images(tmp_path, caplog):
    train = _pictures(tmp_path / "train", "a.png", "b.png", "c.png")
    reg = _pictures(tmp_path / "reg", "r1.png", "r2.png", "r3.png", "r4.png")
    subsets = [
        SubsetConfig(image_dir=train, num_repeats=3),
        SubsetConfig(image_dir=reg, is_reg=True),
    ]
    dataset = _dataset(_config(*subsets), prior_loss_weight=0.25)
    batches = _epoch(dataset, 0)
    counts = Counter(_names(batches))
    assert [counts[f"r{i}.png"] for i in range(1, 5)] == [3, 2, 2, 2]
    assert (dataset.num_train_images, dataset.num_reg_images) == (9, 9)
    for batch in batches:
        weights = [0.25 if "reg" in Path(path).parts else 1.0 for path in batch.image_paths]
        assert batch.loss_weights.tolist() == weights
        assert batch.is_reg == [weight == 0.25 for weight in weights]
    caplog.clear()
    dataset = _dataset(_config(SubsetConfig(image_dir=train), subsets[1]))
    assert Counter(_names(_epoch(dataset, 0)))["r4.png"] == 0
    assert "1 of 4 regularisation images are not used" in caplog.text


def test_a_broken_picture_is_named_counted_and_skipped(folder, caplog):
    (folder / "broken.jpg").write_bytes(b"no picture")
    dataset = _dataset(_config(SubsetConfig(image_dir=folder)))
    assert len(dataset.images) == 5
    assert list(dataset.skipped) == [folder / "broken.jpg"]
    assert "broken.jpg" in caplog.text
    assert "unusable files, skipped: 1" in caplog.text


def test_a_picture_too_small_for_a_bucket_is_skipped(folder, caplog):
    _pictures(folder, "tiny.png", size=(20, 200))
    config = _config(SubsetConfig(image_dir=folder), enable_bucket=True, bucket_no_upscale=True)
    assert list(_dataset(config).skipped) == [folder / "tiny.png"]
    assert "20x200 is too small" in caplog.text


def test_nothing_to_train_on_is_an_error_with_its_reason(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no picture in .*empty"):
        _dataset(_config(SubsetConfig(image_dir=empty)))
    (empty / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 unusable"):
        _dataset(_config(SubsetConfig(image_dir=empty)))
    reg = SubsetConfig(image_dir=_pictures(tmp_path / "reg", "a.png"), is_reg=True)
    with pytest.raises(UserError, match="regularisation images alone"):
        _dataset(_config(reg))
    with pytest.raises(UserError, match="is not a folder"):
        _dataset(_config(SubsetConfig(image_dir=tmp_path / "nowhere")))


def test_pictures_one_folder_deeper_are_pointed_out(tmp_path, caplog):
    _pictures(tmp_path / "10_dog", "a.png")
    with pytest.raises(UserError):
        _dataset(_config(SubsetConfig(image_dir=tmp_path)))
    assert "sub-folders 10_dog" in caplog.text


def test_an_empty_caption_file_is_named_and_class_tokens_are_used(folder, caplog):
    (folder / "0.caption").write_text(" \n")
    dataset = _dataset(_config(SubsetConfig(image_dir=folder, class_tokens="sks dog")))
    assert {info.caption for info in dataset.images} == {"sks dog"}
    assert "0.caption is empty" in caplog.text


def test_the_epoch_for_caption_dropout_counts_from_one(folder):
    subset = SubsetConfig(image_dir=folder, class_tokens="x", caption_dropout_every_n_epochs=2)
    dataset = _dataset(_config(subset))
    captions = [{c for b in _epoch(dataset, epoch) for c in b.captions} for epoch in range(4)]
    assert captions == [{"x"}, {""}, {"x"}, {""}]


def test_token_warmup_follows_the_step(folder):
    subset = SubsetConfig(image_dir=folder, class_tokens="a, b, c, d", token_warmup_step=0.5)
    dataset = _dataset(_config(subset))
    dataset.set_max_train_steps(12)
    captions = []
    for step in (0, 3, 6):
        captions.append(dataset[BatchKey(0, 0, step)].captions[0])
    assert captions == ["a", "a, b", "a, b, c, d"]


@pytest.mark.parametrize("name", ["meta.json", "meta.jsonl"])
def test_metadata_files_give_captions_and_tags(tmp_path, name):
    folder = _pictures(tmp_path / "pictures", "a.png", "b.png")
    entries = {"a.png": {"caption": "a dog", "tags": "x, y"}, "b": {"tags": "z"}}
    if name.endswith("jsonl"):
        lines = [json.dumps({"image_path": key} | entry) for key, entry in entries.items()]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    else:
        (tmp_path / name).write_text(json.dumps(entries))
    subset = SubsetConfig(image_dir=folder, metadata_file=tmp_path / name)
    captions = {i.path.name: i.caption for i in _dataset(_config(subset)).images}
    assert captions == {"a.png": "a dog,x, y", "b.png": "z"}


def test_metadata_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"metadata_file: .*meta\.json: is not valid JSON"):
        _dataset(_config(SubsetConfig(metadata_file=path)))
    path.write_text('{"a.png": {"caption": "x"}}')
    with pytest.raises(UserError, match="image_dir: needed"):
        _dataset(_config(SubsetConfig(metadata_file=path)))


def _masked_folder(tmp_path):
    """A wide picture that is dark left of the middle, and a mask that is black there."""
    pictures = _pictures(tmp_path / "pictures", "a.png", size=(200, 100))
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 255
    Image.fromarray(mask).save(masks / "a.jpg", quality=95)
    return pictures, masks


def test_masks_are_cropped_and_mirrored_with_their_picture(tmp_path):
    pictures, masks = _masked_folder(tmp_path)
    subset = SubsetConfig(
        image_dir=pictures, conditioning_data_dir=masks, flip_aug=True, random_crop=True
    )
    dataset = _dataset(_config(subset, enable_bucket=True), masked_loss=True)
    edges = set()
    for epoch in range(30):
        batch = dataset[BatchKey(epoch, 0)]
        assert batch.loss_masks.shape == (1, 1, *batch.pixel_values.shape[2:])
        bright = batch.pixel_values[0, 0, 5] > batch.pixel_values[0, 0].mean()
        learned = batch.loss_masks[0, 0, 5] > 0.5
        assert (bright != learned).sum() <= 2
        edges.add((bool(learned[0]), int(learned.sum())))
    assert len(edges) > 2


def test_alpha_masks_need_no_switch_and_others_count_fully(tmp_path):
    opaque = _pictures(tmp_path / "opaque", "o.png")
    cut_out = tmp_path / "alpha"
    cut_out.mkdir()
    pixels = np.full((SIZE, SIZE, 4), 100, np.uint8)
    pixels[:, :, 3] = 0
    pixels[:16, :, 3] = 255
    Image.fromarray(pixels).save(cut_out / "a.png")
    subsets = [SubsetConfig(image_dir=opaque), SubsetConfig(image_dir=cut_out, alpha_mask=True)]
    batch = _dataset(_config(*subsets))[FIRST]
    shares = {
        Path(path).name: float(mask.mean())
        for path, mask in zip(batch.image_paths, batch.loss_masks, strict=True)
    }
    assert shares == {"o.png": 1.0, "a.png": 0.25}


def _with_alpha(path, alpha, mode="RGBA"):
    """A picture whose transparency is the same everywhere."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((SIZE, SIZE, 4), 100, np.uint8)
    pixels[:, :, 3] = alpha
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize("name", ["b.png", "b.webp", "b.tiff"])
def test_a_picture_that_is_transparent_everywhere_is_skipped_by_name(name, tmp_path, caplog):
    _with_alpha(tmp_path / "a.png", alpha=1)
    _with_alpha(tmp_path / name, alpha=0)
    dataset = _dataset(_config(SubsetConfig(image_dir=tmp_path, alpha_mask=True)))
    assert [info.path.name for info in dataset.images] == ["a.png"]
    assert f"skipping {tmp_path / name}: it is transparent everywhere" in caplog.text
    whole = _dataset(_config(SubsetConfig(image_dir=tmp_path)))
    assert len(whole.images) == 2, "without a mask it is white, and learned"


def test_grey_with_transparency_is_skipped_too(tmp_path, caplog):
    _with_alpha(tmp_path / "a.png", alpha=0, mode="LA")
    with pytest.raises(
        UserError, match=r"no usable picture.*a\.png \(it is transparent everywhere"
    ):
        _dataset(_config(SubsetConfig(image_dir=tmp_path, alpha_mask=True)))


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_a_picture_with_a_black_mask_is_skipped_by_name(mode, tmp_path, caplog):
    pictures, masks = tmp_path / "pictures", tmp_path / "masks"
    masks.mkdir()
    for name, value in (("a", 255), ("b", 0)):
        _with_alpha(pictures / f"{name}.png", alpha=255)
        Image.new("L", (SIZE, SIZE), value).convert(mode).save(masks / f"{name}.png")
    subset = SubsetConfig(image_dir=pictures, conditioning_data_dir=masks)
    dataset = _dataset(_config(subset), masked_loss=True)
    assert [info.path.name for info in dataset.images] == ["a.png"]
    assert f"its mask {masks / 'b.png'} is black everywhere" in caplog.text


def _scaled_dataset(folder, *more, seed=0, batch_size=3, **settings):
    subset = SubsetConfig(
        image_dir=folder,
        class_tokens="a photo of sks dog",
        num_repeats=8,
        scale_aug=True,
        **settings,
    )
    config = _config(subset, *more, batch_size=batch_size, enable_bucket=True, min_bucket_reso=64)
    return _dataset(config, seed=seed, masked_loss="conditioning_data_dir" in settings)


SCALE_WORDS = ("a far away", "very small", "zoomed in", "close up")


def test_scaled_pictures_tell_their_scale_and_where_they_are(tmp_path):
    square = _pictures(tmp_path / "a", "a.png", "b.png")
    _pictures(square, "wide.png", size=(192, 96))
    dataset = _scaled_dataset(square, flip_aug=True)
    seen = Counter()
    for batch in _epoch(dataset, 0) + _epoch(dataset, 1):
        assert batch.loss_masks is None
        assert batch.valid_masks.shape == (len(batch.captions), 1, *batch.pixel_values.shape[2:])
        for pixels, mask, caption in zip(
            batch.pixel_values, batch.valid_masks, batch.captions, strict=True
        ):
            words = caption.removesuffix(" photo of sks dog")
            seen[words] += 1
            blank = (pixels == 0).all(0)
            assert bool(blank.any()) == (words in SCALE_WORDS[:2]) == (not mask.all())
            assert not (blank & mask[0].bool()).any()
            assert mask.sum() > 0
    assert set(seen) == {*SCALE_WORDS, "a"}


def test_scaled_batches_are_the_same_for_equal_seed_epoch_and_number(tmp_path):
    folder = _pictures(tmp_path / "a", "a.png", "b.png")
    one, other = _scaled_dataset(folder, color_aug=True), _scaled_dataset(folder, color_aug=True)
    for index in reversed(range(len(one))):
        key = BatchKey(2, index)
        assert _same(one[key], other[key])
        assert torch.equal(one[key].valid_masks, other[key].valid_masks)
    assert _epoch(one, 0)[0].captions != _epoch(_scaled_dataset(folder, seed=1), 0)[0].captions


def test_regularisation_images_are_never_scaled(tmp_path):
    folder = _pictures(tmp_path / "a", "a.png", "b.png")
    reg = _pictures(tmp_path / "reg", "r.png")
    reg_subset = SubsetConfig(image_dir=reg, class_tokens="a dog", is_reg=True, scale_aug=True)
    plain = _dataset(_config(SubsetConfig(image_dir=reg)))[FIRST].pixel_values[0]
    count = 0
    for batch in _epoch(_scaled_dataset(folder, reg_subset), 0):
        for i, is_reg in enumerate(batch.is_reg):
            if is_reg:
                count += 1
                assert batch.captions[i] == "a dog"
                assert batch.valid_masks[i].all()
                assert torch.equal(batch.pixel_values[i], plain)
    assert count == 16


def test_an_unscaled_subset_takes_nothing_from_the_stream_for_scales(folder):
    subset = SubsetConfig(image_dir=folder, class_tokens="a, b, c, d, e", shuffle_caption=True)
    dataset = _dataset(_config(subset, batch_size=1), seed=7)
    for index, batch in enumerate(_epoch(dataset, 2)):
        rng = random.Random(f"7/2/{index}")
        assert batch.captions == [
            process_caption("a, b, c, d, e", subset, rng=rng, epoch=3, step=0)
        ]
        assert batch.valid_masks is None


def test_loss_masks_are_scaled_with_their_picture(tmp_path):
    pictures, masks = _masked_folder(tmp_path)
    dataset = _scaled_dataset(
        pictures, conditioning_data_dir=masks, flip_aug=True, random_crop=True, batch_size=8
    )
    middle = image_tensor(open_image(pictures / "a.png"))[0].mean()
    for epoch in range(4):
        (batch,) = _epoch(dataset, epoch)
        for pixels, mask, valid in zip(
            batch.pixel_values, batch.loss_masks, batch.valid_masks, strict=True
        ):
            assert mask[:, (pixels == 0).all(0)].sum() == 0
            inside = valid[0].bool()
            bright = pixels[0][inside] > middle
            assert (bright != (mask[0][inside] > 0.5)).float().mean() < 0.05


def test_a_dropped_caption_stays_empty_at_every_scale(tmp_path):
    folder = _pictures(tmp_path / "a", "a.png")
    batches = _epoch(_scaled_dataset(folder, caption_dropout_rate=1.0), 0)
    assert {caption for batch in batches for caption in batch.captions} == {""}


def test_enlarged_pictures_are_cut_from_the_file_not_from_the_small_picture(tmp_path):
    fine = np.zeros((512, 512, 3), np.uint8)
    fine[:, ::8] = 255  # lines that a picture of 64 pixels cannot hold
    (tmp_path / "a").mkdir()
    Image.fromarray(fine).save(tmp_path / "a" / "a.png")
    contrasts = [
        float(pixels[0, 10:-10, 10:-10].std())
        for batch in _epoch(_scaled_dataset(tmp_path / "a"), 0)
        for pixels, caption in zip(batch.pixel_values, batch.captions, strict=True)
        if caption.startswith(SCALE_WORDS[2:])
    ]
    assert min(contrasts) > 0.05


def test_a_picture_too_small_for_scales_is_refused(tmp_path):
    folder = _pictures(tmp_path / "a", "a.png")
    subset = SubsetConfig(image_dir=folder, scale_aug=True)
    with pytest.raises(UserError, match=r"scale_aug: .*a\.png is trained at 32x32.*at least 40"):
        _dataset(DatasetConfig(batch_size=1, resolution=(32, 32), subsets=(subset,)))


TEMPLATES = ("a photo of a {}", "a picture of {}", "an image of {}")


def test_templates_take_the_place_of_captions_but_not_of_regularisation_captions(tmp_path):
    (tmp_path / "a").mkdir()
    folder = _pictures(tmp_path / "a", "a.png", "b.png")
    (folder / "a.caption").write_text("a dog in the garden")
    reg = _pictures(tmp_path / "reg", "r.png")
    other = _pictures(tmp_path / "b", "c.png")
    config = _config(
        SubsetConfig(image_dir=folder, class_tokens="sks  dog", num_repeats=10),
        SubsetConfig(image_dir=other, num_repeats=20),
        SubsetConfig(image_dir=reg, class_tokens="a dog", is_reg=True),
    )
    dataset = _dataset(config, templates=TEMPLATES, concept="zwx cat")
    captions = {"a": set(), "b": set(), "reg": set()}
    for batch in _epoch(dataset, 0):
        for path, caption in zip(batch.image_paths, batch.captions, strict=True):
            captions[Path(path).parent.name].add(caption)
    assert captions["a"] == {t.replace("{}", "sks dog") for t in TEMPLATES}
    assert captions["b"] == {t.replace("{}", "zwx cat") for t in TEMPLATES}
    assert captions["reg"] == {"a dog"}
    again = _dataset(config, templates=TEMPLATES, concept="zwx cat")
    assert all(
        _same(one, two) for one, two in zip(_epoch(dataset, 1), _epoch(again, 1), strict=True)
    )


def _captions_seen(dataset, num_epochs=20):
    return {c for epoch in range(num_epochs) for b in _epoch(dataset, epoch) for c in b.captions}


@pytest.mark.parametrize("settings", [{}, {"templates": ("a photo of {}", "art of {}")}])
def test_what_a_picture_may_be_captioned_is_what_training_sees(folder, settings):
    (folder / "0.txt").write_text("one dog\nanother dog")
    subset = SubsetConfig(
        image_dir=folder,
        class_tokens="sks dog",
        caption_extension=".txt",
        caption_prefix="by day,",
        caption_suffix="outside",
        enable_wildcard=True,
    )
    dataset = _dataset(_config(subset), **settings)
    possible = {caption for info in dataset.images for caption in dataset.captions_of(info)}
    assert _captions_seen(dataset) == possible
    assert possible == (
        {"by day, a photo of sks dog outside", "by day, art of sks dog outside"}
        if settings
        else {"by day, one dog", "another dog outside", "by day, sks dog outside"}
    )


def test_without_wildcards_only_the_first_line_is_a_caption(folder, tmp_path):
    metadata = {str(folder / "0.png"): {"caption": "one dog\nanother dog"}}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(metadata))
    subset = SubsetConfig(metadata_file=path, caption_prefix="sks", caption_suffix="outside")
    dataset = _dataset(_config(subset))
    (info,) = dataset.images
    assert dataset.captions_of(info) == ["sks one dog"]
    assert _captions_seen(dataset, 2) == {"sks one dog"}


def test_templates_without_a_concept_are_refused(folder):
    config = _config(SubsetConfig(image_dir=folder))
    with pytest.raises(UserError, match=r"templates: nothing says what .*sks dog shows"):
        _dataset(config, templates=TEMPLATES)
    assert _dataset(config, templates=TEMPLATES, concept="sks dog")[FIRST].captions


def test_a_template_is_prefixed_and_dropped_like_a_caption(folder):
    subset = SubsetConfig(
        image_dir=folder, class_tokens="x", caption_prefix="p", caption_dropout_every_n_epochs=2
    )
    dataset = _dataset(_config(subset), templates=("a photo of {}",))
    assert [set(b.captions) for b in (dataset[BatchKey(0, 0)], dataset[BatchKey(1, 0)])] == [
        {"p a photo of x"},
        {""},
    ]


def test_masks_that_do_not_fit_are_refused(tmp_path):
    pictures, masks = _masked_folder(tmp_path)
    subset = SubsetConfig(image_dir=pictures, conditioning_data_dir=masks)
    with pytest.raises(UserError, match="needs masked_loss"):
        _dataset(_config(subset))
    _pictures(pictures, "b.png")
    with pytest.raises(UserError, match=r"lacks masks for 1 of 2 pictures \(b\.png\)"):
        _dataset(_config(subset), masked_loss=True)
    _pictures(masks, "b.png", size=(SIZE, 2 * SIZE))
    with pytest.raises(UserError, match="does not have the shape of its picture"):
        _dataset(_config(subset), masked_loss=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"face_crop_aug_range": (1.0, 2.0)}, "face_crop_aug_range"),
        ({"resize_interpolation": "sinc"}, "resize_interpolation: 'sinc'"),
        ({"alpha_mask": True, "conditioning_data_dir": Path("x")}, "choose one"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder, settings, message):
    with pytest.raises(UserError, match=message):
        _dataset(_config(SubsetConfig(image_dir=folder, **settings)), masked_loss=True)


def test_masked_loss_without_any_mask_is_refused(folder):
    with pytest.raises(UserError, match="no data has a mask"):
        _dataset(_config(SubsetConfig(image_dir=folder)), masked_loss=True)


def test_a_resolution_that_latents_cannot_hold_is_refused(folder):
    config = DatasetConfig(
        batch_size=1, resolution=(60, 64), subsets=(SubsetConfig(image_dir=folder),)
    )
    with pytest.raises(UserError, match="multiples of 8"):
        _dataset(config)


def test_a_picture_that_changes_during_the_run_is_named(folder):
    dataset = _dataset(_config(SubsetConfig(image_dir=folder), batch_size=5))
    _pictures(folder, "3.png", size=(80, 64))
    with pytest.raises(UserError, match=r"3\.png: its size changed"):
        dataset[FIRST]
    (folder / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png"):
        dataset[FIRST]
