"""Cached latents: right ones, reused only when picture, size and VAE are the same."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.data.dataset import BatchKey, TrainDataset
from mlm_plugin.errors import UserError


class Encoder:
    """Mean of each 8x8 block, with a fourth channel; counts the pictures it saw."""

    def __init__(self):
        self.num_images, self.largest_batch = 0, 0

    def __call__(self, images):
        assert not torch.is_grad_enabled()
        self.num_images += len(images)
        self.largest_batch = max(self.largest_batch, len(images))
        pooled = avg_pool2d(images, 8)
        return torch.cat([pooled, pooled.mean(1, keepdim=True)], dim=1)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "5_dog"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(64, 64), (64, 64), (64, 64), (192, 64)]):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def _dataset(*subsets, resolution=(64, 64), bucketed=True, **settings):
    config = DatasetConfig(
        batch_size=2,
        resolution=resolution,
        enable_bucket=bucketed,
        min_bucket_reso=32,
        max_bucket_reso=256,
        bucket_reso_steps=32,
        subsets=subsets,
    )
    return TrainDataset([config], seed=0, **settings)


def _cache(dataset, *, to_disk=True, vae_id="vae-1", **settings):
    encoder = Encoder()
    dataset.cache_latents(encoder, vae_id=vae_id, to_disk=to_disk, batch_size=2, **settings)
    return encoder.num_images


def _cached_anew(folder, **settings):
    """Number of pictures encoded by a fresh run over the folder."""
    subset = SubsetConfig(image_dir=folder, **settings.pop("subset", {}))
    vae_id = settings.pop("vae_id", "vae-1")
    skip_check = settings.pop("skip_check", False)
    return _cache(_dataset(subset, **settings), vae_id=vae_id, skip_check=skip_check)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("bucketed", [False, True])
def test_cached_batches_equal_encoded_ones(folder, to_disk, bucketed):
    subset = SubsetConfig(
        image_dir=folder, flip_aug=True, class_tokens="a, b", shuffle_caption=True
    )
    plain, cached = _dataset(subset, bucketed=bucketed), _dataset(subset, bucketed=bucketed)
    assert _cache(cached, to_disk=to_disk) == 8
    assert any(folder.glob("*.npz")) == to_disk
    for epoch in range(4):
        for index in range(len(plain)):
            pixels, latents = plain[BatchKey(epoch, index)], cached[BatchKey(epoch, index)]
            assert latents.pixel_values is None
            with torch.no_grad():
                torch.testing.assert_close(latents.latents, Encoder()(pixels.pixel_values))
            for name in ("captions", "crop_top_lefts", "target_sizes", "original_sizes"):
                assert getattr(latents, name) == getattr(pixels, name)


def test_pictures_are_encoded_in_batches_of_one_size(folder):
    dataset, encoder = _dataset(SubsetConfig(image_dir=folder)), Encoder()
    dataset.cache_latents(encoder, vae_id="v", batch_size=2)
    assert (encoder.num_images, encoder.largest_batch) == (4, 2)


def test_files_carry_the_names_and_keys_of_sd_scripts(folder):
    _cached_anew(folder, subset={"flip_aug": True})
    names = sorted(path.name for path in folder.glob("*.npz"))
    assert names == [f"{i}_0064x0064_sd.npz" for i in range(3)] + ["3_0192x0064_sd.npz"]
    _cache(_dataset(SubsetConfig(image_dir=folder)), is_sdxl=True)  # beside them
    assert {path.name for path in folder.glob("*_sdxl.npz")} == {
        name.replace("_sd.", "_sdxl.") for name in names
    }
    with np.load(folder / "3_0192x0064_sd.npz") as file:
        assert {"latents", "latents_flipped", "original_size", "crop_ltrb"} < set(file)
        assert file["latents"].shape == (4, 4, 12)
        assert file["latents"].dtype == np.float32
        assert file["original_size"].tolist() == [192, 64]


def test_valid_files_are_used_again(folder):
    assert _cached_anew(folder) == 4
    assert _cached_anew(folder) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"vae_id": "vae-2"},
        {"resolution": (96, 96)},
        {"subset": {"flip_aug": True}},
        {"subset": {"alpha_mask": True}},
        {"subset": {"resize_interpolation": "nearest"}},
    ],
    ids=str,
)
def test_files_of_another_vae_size_or_setting_are_made_again(folder, change):
    _cached_anew(folder)
    num_encodings = 8 if change.get("subset", {}).get("flip_aug") else 4
    assert _cached_anew(folder, **dict(change)) == num_encodings
    assert _cached_anew(folder, **dict(change)) == 0


def test_a_changed_picture_is_encoded_again(folder):
    _cached_anew(folder)
    shutil.copy(folder / "0.png", folder / "1.png")
    assert _cached_anew(folder) == 1


def test_a_broken_file_and_one_of_sd_scripts_are_made_again(folder):
    _cached_anew(folder)
    (folder / "0_0064x0064_sd.npz").write_bytes(b"broken")
    path = folder / "1_0064x0064_sd.npz"
    with np.load(path) as file:
        upstream = {key: file[key] for key in file if not key.startswith("mlm_plugin")}
    np.savez(path, **upstream)
    assert _cached_anew(folder) == 2
    assert _cached_anew(folder) == 0


def test_skipping_the_check_takes_any_file_and_a_wrong_one_is_named_later(folder):
    _cached_anew(folder)
    dataset = _dataset(SubsetConfig(image_dir=folder), resolution=(96, 96))
    assert _cache(dataset, vae_id="vae-2", skip_check=True) == 0
    with pytest.raises(UserError, match=r"_sd\.npz: latents of the file has shape"):
        dataset[BatchKey(0, 0)]


def test_one_name_for_two_entries_does_not_mix_them_up(folder):
    (folder / "0.bmp").write_bytes((folder / "1.png").read_bytes())
    configs = [
        DatasetConfig(batch_size=1, resolution=size, subsets=(SubsetConfig(image_dir=folder),))
        for size in ((64, 64), (32, 32))
    ]
    plain, cached = TrainDataset(configs, seed=0), TrainDataset(configs, seed=0)
    assert _cache(cached) == 10
    for key in (BatchKey(0, index) for index in range(len(plain))):
        with torch.no_grad():
            expected = Encoder()(plain[key].pixel_values)
        torch.testing.assert_close(cached[key].latents, expected)
    assert _cache(TrainDataset(configs, seed=0)) == 0


@pytest.mark.parametrize("to_disk", [False, True])
def test_masks_are_cached_with_their_latents(folder, tmp_path, to_disk):
    masks = tmp_path / "masks"
    masks.mkdir()
    rng = np.random.default_rng(1)
    for path in folder.glob("*.png"):
        size = Image.open(path).size
        mask = rng.integers(0, 256, size[::-1], dtype=np.uint8)
        Image.fromarray(mask).save(masks / path.name)
    subset = SubsetConfig(image_dir=folder, conditioning_data_dir=masks, flip_aug=True)
    plain, cached = (_dataset(subset, masked_loss=True) for _ in range(2))
    _cache(cached, to_disk=to_disk)
    for epoch in range(3):
        for index in range(len(plain)):
            key = BatchKey(epoch, index)
            torch.testing.assert_close(cached[key].loss_masks, plain[key].loss_masks)
    Image.new("L", (64, 64), 255).save(masks / "0.png")
    if to_disk:
        assert _cache(_dataset(subset, masked_loss=True)) == 2


@pytest.mark.parametrize("setting", ["color_aug", "random_crop", "scale_aug"])
def test_pictures_that_change_cannot_be_cached(folder, setting):
    dataset = _dataset(SubsetConfig(image_dir=folder, **{setting: True}), bucketed=False)
    with pytest.raises(UserError, match=f"impossible with {setting}"):
        _cache(dataset)


def test_nan_latents_name_the_picture(folder):
    dataset = _dataset(SubsetConfig(image_dir=folder))
    with pytest.raises(UserError, match=r"\.png: the VAE gives NaN"):
        dataset.cache_latents(lambda images: Encoder()(images) * float("nan"), vae_id="v")


def test_a_folder_that_cannot_be_written_is_named_once(folder, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("mlm_plugin.data.latents.np.savez", refuse)
    _cached_anew(folder)
    assert caplog.text.count("cache_latents_to_disk: cannot write") == 1
    assert "kept in memory" in caplog.text
    assert not list(folder.glob("*.npz"))
    assert not list(folder.glob(".*"))
