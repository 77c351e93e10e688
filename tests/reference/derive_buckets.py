"""Derive the bucket and caption numbers in tests/data by running sd-scripts itself.

Usage: ``SD_SCRIPTS_DIR=/path/to/sd-scripts python tests/reference/derive_buckets.py``

sd-scripts must be a checkout of kohya-ss/sd-scripts (the stored numbers come from commit
48d368fa), with its small requirements installed (imagesize, voluptuous, einops, toml,
opencv-python-headless, ftfy). torchvision is not needed.
"""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace

from sd_scripts import enable_imports

BUCKET_CASES = [  # (resolution, min, max, steps)
    ((512, 512), 256, 1024, 64),
    ((512, 768), 256, 1024, 64),
    ((640, 640), 320, 960, 32),
    ((1024, 1024), 512, 2048, 64),
]
IMAGE_SIZES = [
    (640, 640), (512, 512), (1920, 1080), (1080, 1920), (300, 200), (4000, 3000), (768, 512),
    (1000, 333), (257, 1999), (513, 511), (64, 64), (6000, 400), (704, 384), (451, 800),
]  # fmt: skip
CAPTIONS = [  # (caption, settings, step, epoch)
    ("a, b, c, d", {}, 0, 1),
    ("a, b, c, d", {"shuffle_caption": True}, 0, 1),
    ("a, b, c, d", {"shuffle_caption": True, "keep_tokens": 1}, 0, 1),
    (
        "a, b ||| c, d, e ||| z",
        {"shuffle_caption": True, "keep_tokens_separator": "|||"},
        0,
        1,
    ),
    ("a, b ||| c, d, e", {"shuffle_caption": True, "keep_tokens_separator": "|||"}, 0, 1),
    ("a, b, c, d, e, f", {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1}, 0, 1),
    ("a, b, c, d, e, f", {"token_warmup_step": 10, "token_warmup_min": 1}, 5, 1),
    ("a, b, c, d, e, f", {"token_warmup_step": 0.1, "token_warmup_min": 2}, 3, 1),
    ("a {red|green|blue} cat, {{x}}", {"enable_wildcard": True}, 0, 1),
    ("one\ntwo\nthree", {"enable_wildcard": True}, 0, 1),
    ("one\ntwo", {}, 0, 1),
    ("cat", {"caption_prefix": "pre", "caption_suffix": "post"}, 0, 1),
    ("cat", {"caption_dropout_rate": 0.5}, 0, 1),
    ("cat", {"caption_dropout_every_n_epochs": 2}, 0, 2),
    ("cat", {"caption_dropout_every_n_epochs": 2}, 0, 3),
    (
        "a;;;b, c, d",
        {"secondary_separator": ";;;", "shuffle_caption": True},
        0,
        1,
    ),
    ("a;;;b, c", {"secondary_separator": ";;;"}, 0, 1),
    ("a| b |c", {"shuffle_caption": True, "caption_separator": "|"}, 0, 1),
    (
        "x, {p|q}, r, s",
        {
            "enable_wildcard": True,
            "shuffle_caption": True,
            "caption_tag_dropout_rate": 0.3,
            "caption_prefix": "sks,",
            "keep_tokens": 1,
            "caption_dropout_rate": 0.1,
        },
        0,
        1,
    ),
]


def main() -> None:
    """Print the tables, ready to be pasted."""
    enable_imports()
    model_util = importlib.import_module("library.model_util")
    train_util = importlib.import_module("library.train_util")

    print("RESOLUTIONS = {")
    for case in BUCKET_CASES:
        print(f"    {case}: {model_util.make_bucket_resolutions(*case)},")
    print("}\nSELECTED = {")
    for case in BUCKET_CASES:
        for no_upscale in (False, True):
            resolution, low, high, steps = case
            manager = train_util.BucketManager(no_upscale, resolution, low, high, steps)
            if not no_upscale:
                manager.make_buckets()
            print(f"    ({case}, {no_upscale}): [")
            for size in IMAGE_SIZES:
                print(f"        {_selection(manager, size)},")
            print("    ],")
    print("}\nCAPTIONS = [")
    for caption, settings, step, epoch in CAPTIONS:
        results = [_caption(train_util, caption, settings, step, epoch, i) for i in range(4)]
        print(f"    ({caption!r}, {settings!r}, {step}, {epoch}, {results!r}),")
    print("]")


def _selection(manager, size):
    try:
        bucket, resized, _ = manager.select_bucket(*size)
    except (ZeroDivisionError, AssertionError) as error:
        return size, type(error).__name__
    if 0 in bucket:
        return size, bucket, resized, None
    return size, bucket, resized, manager.get_crop_ltrb(bucket, size)


def _caption(train_util, caption, settings, step, epoch, seed):
    defaults = {
        "caption_prefix": None,
        "caption_suffix": None,
        "caption_dropout_rate": 0.0,
        "caption_dropout_every_n_epochs": 0,
        "enable_wildcard": False,
        "shuffle_caption": False,
        "token_warmup_step": 0,
        "token_warmup_min": 1,
        "caption_tag_dropout_rate": 0.0,
        "keep_tokens": 0,
        "keep_tokens_separator": "",
        "caption_separator": ",",
        "secondary_separator": None,
    }
    subset = SimpleNamespace(**{**defaults, **settings})
    dataset = train_util.BaseDataset(None, 1.0, False)
    dataset.current_epoch, dataset.current_step, dataset.max_train_steps = epoch, step, 100
    random.seed(seed)
    return dataset.process_caption(subset, caption)


if __name__ == "__main__":
    main()
