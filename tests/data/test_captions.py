"""Captions: found as sd-scripts finds them, rewritten draw for draw like it."""

import random

import pytest
from PIL import Image

from mlm_plugin.config.datasets import SubsetConfig
from mlm_plugin.data.captions import (
    FoundCaption,
    ineffective_settings,
    metadata_caption,
    possible_captions,
    process_caption,
    read_captions,
)
from mlm_plugin.data.sources import captions_in
from mlm_plugin.errors import UserError

# Printed by tests/reference/derive_buckets.py, which runs library.train_util
# BaseDataset.process_caption of sd-scripts at commit 48d368fa after random.seed(0), 1, 2, 3, with
# a run of 100 steps: (caption, settings, step, epoch, results).
UPSTREAM = [
    ("a, b, c, d", {}, 0, 1, ["a, b, c, d", "a, b, c, d", "a, b, c, d", "a, b, c, d"]),
    (
        "a, b, c, d",
        {"shuffle_caption": True},
        0,
        1,
        ["c, a, b, d", "d, a, c, b", "b, c, d, a", "d, a, c, b"],
    ),
    (
        "a, b, c, d",
        {"shuffle_caption": True, "keep_tokens": 1},
        0,
        1,
        ["a, b, d, c", "a, c, d, b", "a, c, d, b", "a, c, d, b"],
    ),
    (
        "a, b ||| c, d, e ||| z",
        {"shuffle_caption": True, "keep_tokens_separator": "|||"},
        0,
        1,
        ["a, b, c, e, d, z", "a, b, d, e, c, z", "a, b, d, e, c, z", "a, b, d, e, c, z"],
    ),
    (
        "a, b ||| c, d, e",
        {"shuffle_caption": True, "keep_tokens_separator": "|||"},
        0,
        1,
        ["a, b, c, e, d", "a, b, d, e, c", "a, b, d, e, c", "a, b, d, e, c"],
    ),
    (
        "a, b, c, d, e, f",
        {"caption_tag_dropout_rate": 0.5, "keep_tokens": 1},
        0,
        1,
        ["a, b, c, f", "a, c, d", "a, b, c, f", "a, c, e, f"],
    ),
    (
        "a, b, c, d, e, f",
        {"token_warmup_step": 10, "token_warmup_min": 1},
        5,
        1,
        ["a, b, c", "a, b, c", "a, b, c", "a, b, c"],
    ),
    (
        "a, b, c, d, e, f",
        {"token_warmup_step": 0.1, "token_warmup_min": 2},
        3,
        1,
        ["a, b, c", "a, b, c", "a, b, c", "a, b, c"],
    ),
    (
        "a {red|green|blue} cat, {{x}}",
        {"enable_wildcard": True},
        0,
        1,
        ["a green cat, {x}", "a red cat, {x}", "a red cat, {x}", "a red cat, {x}"],
    ),
    ("one\ntwo\nthree", {"enable_wildcard": True}, 0, 1, ["two", "one", "one", "one"]),
    ("one\ntwo", {}, 0, 1, ["one", "one", "one", "one"]),
    (
        "cat",
        {"caption_prefix": "pre", "caption_suffix": "post"},
        0,
        1,
        ["pre cat post", "pre cat post", "pre cat post", "pre cat post"],
    ),
    ("cat", {"caption_dropout_rate": 0.5}, 0, 1, ["cat", "", "cat", ""]),
    ("cat", {"caption_dropout_every_n_epochs": 2}, 0, 2, ["", "", "", ""]),
    ("cat", {"caption_dropout_every_n_epochs": 2}, 0, 3, ["cat", "cat", "cat", "cat"]),
    (
        "a;;;b, c, d",
        {"secondary_separator": ";;;", "shuffle_caption": True},
        0,
        1,
        ["a,b, d, c", "c, d, a,b", "c, d, a,b", "c, d, a,b"],
    ),
    ("a;;;b, c", {"secondary_separator": ";;;"}, 0, 1, ["a,b, c", "a,b, c", "a,b, c", "a,b, c"]),
    (
        "a| b |c",
        {"shuffle_caption": True, "caption_separator": "|"},
        0,
        1,
        ["a, c, b", "b, c, a", "b, c, a", "b, c, a"],
    ),
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
        ["sks, s, r, q, x", "sks, s, p, x", "sks, r, p, s, x", "sks, x, r"],
    ),
]


def _process(caption, *, seed=0, epoch=1, step=0, max_step=100, **settings):
    return process_caption(
        caption,
        SubsetConfig(**settings),
        rng=random.Random(seed),
        epoch=epoch,
        step=step,
        max_step=max_step,
    )


@pytest.mark.parametrize(("caption", "settings", "step", "epoch", "results"), UPSTREAM)
def test_captions_are_rewritten_as_by_sd_scripts(caption, settings, step, epoch, results):
    ours = [_process(caption, seed=s, step=step, epoch=epoch, **settings) for s in range(4)]
    assert ours == results


def test_dropout_happens_at_its_rate():
    rng, subset = random.Random(0), SubsetConfig(caption_dropout_rate=0.3)
    draws = [process_caption("cat", subset, rng=rng, epoch=1, step=0) for _ in range(2000)]
    assert 0.26 < draws.count("") / 2000 < 0.34


def test_the_global_random_stream_is_left_alone():
    state = random.getstate()
    _process("a, b, {c|d}", shuffle_caption=True, enable_wildcard=True, caption_dropout_rate=0.5)
    assert random.getstate() == state


def test_a_share_of_the_run_as_warmup_needs_its_length():
    with pytest.raises(AssertionError, match="share of the run"):
        _process("a, b", token_warmup_step=0.5, max_step=None)


def _write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_the_caption_has_the_stem_of_the_picture(tmp_path):
    _write(tmp_path, a__caption="\n  a dog \nmore\n")
    found = read_captions(tmp_path / "a.png", "caption", False)
    assert found == FoundCaption("a dog", tmp_path / "a.caption", None)


def test_wildcards_read_every_line(tmp_path):
    _write(tmp_path, a__txt="one\r\n\r\n two\r\n")
    assert read_captions(tmp_path / "a.png", ".txt", True).text == "one\ntwo"


def test_face_information_in_the_name_is_not_part_of_the_caption_name(tmp_path):
    _write(tmp_path, my_dog__txt="found")
    assert read_captions(tmp_path / "my_dog_10_20_30_40.png", ".txt", False).text == "found"
    assert read_captions(tmp_path / "dog_10_20_30.png", ".txt", False).text is None


def test_no_file_an_empty_file_and_a_file_elsewhere_differ(tmp_path):
    _write(tmp_path, b__caption=" \n", c__txt="text")
    assert read_captions(tmp_path / "a.png", ".caption", False) == FoundCaption(None, None, None)
    assert read_captions(tmp_path / "b.png", ".caption", False).text == ""
    found = read_captions(tmp_path / "c.png", ".caption", False)
    assert (found.text, found.elsewhere) == (None, tmp_path / "c.txt")


def test_a_byte_order_mark_is_dropped_and_other_encodings_are_refused(tmp_path):
    _write(tmp_path, a__txt="\ufeffcafé".encode(), b__txt="café".encode("latin-1"))
    assert read_captions(tmp_path / "a.png", ".txt", False).text == "café"
    with pytest.raises(UserError, match=r"b\.txt.*UTF-8"):
        read_captions(tmp_path / "b.png", ".txt", False)


@pytest.mark.parametrize(
    ("caption", "tags", "wildcard", "result"),
    [
        ("a dog", "x, y", False, "a dog,x, y"),
        (None, "x, y", False, "x, y"),
        ("a dog", None, False, "a dog"),
        ("one\ntwo", "x\ny", True, "one,x,y\ntwo,x,y"),
        ("", "x", True, "x"),
        (None, None, True, ""),
    ],
)
def test_metadata_captions_carry_their_tags(caption, tags, wildcard, result):
    assert metadata_caption(caption, tags, SubsetConfig(enable_wildcard=wildcard)) == result


def test_settings_without_effect_are_named():
    lines = ineffective_settings(
        SubsetConfig(keep_tokens=1, keep_tokens_separator="|||", token_warmup_min=2)
    )
    assert [line.split()[0] for line in lines] == [
        "keep_tokens",
        "keep_tokens_separator",
        "token_warmup_min",
    ]
    assert ineffective_settings(SubsetConfig(keep_tokens=1, shuffle_caption=True)) == []


@pytest.mark.parametrize("number", [2, 3])
def test_all_captions_in_another_encoding_are_named_at_once(tmp_path, number):
    for index in range(number + 1):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
        text = "a caf\u00e9 in Paris" if index else "a cafe"
        (tmp_path / f"{index}.txt").write_bytes(text.encode("latin-1"))
    subset = SubsetConfig(image_dir=tmp_path, caption_extension=".txt")
    with pytest.raises(UserError) as caught:
        captions_in(subset)
    message = str(caught.value)
    assert f"{number} captions are not UTF-8" in message
    assert all(f"{index}.txt (byte 5)" in message for index in range(1, number + 1))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("caption", "settings", "possible"),
    [
        ("sks girl, red\nsks girl, blue", {}, ["sks girl, red"]),
        (
            "sks girl, {red|blue|green} {hat|cap}\nsks girl",
            {"enable_wildcard": True},
            ["sks girl, red hat", "sks girl, blue cap", "sks girl, green hat", "sks girl"],
        ),
        ("{{a}} dog", {"enable_wildcard": True}, ["{a} dog"]),
        (
            "sks girl ||| park, sitting",
            {"keep_tokens_separator": "|||", "shuffle_caption": True},
            ["sks girl, park, sitting"],
        ),
        ("sks girl ||| park", {"keep_tokens_separator": "|||"}, ["sks girl ||| park"]),
        ("sks girl, hat;;;red", {"secondary_separator": ";;;"}, ["sks girl, hat,red"]),
        ("park", {"caption_prefix": "sks girl,", "caption_suffix": "end"}, ["sks girl, park end"]),
    ],
)
def test_possible_captions_are_what_training_makes_of_them(caption, settings, possible):
    subset = SubsetConfig(**settings)
    assert possible_captions(caption, subset) == possible
    rng = random.Random(0)
    drawn = {process_caption(caption, subset, rng=rng, epoch=1, step=0) for _ in range(50)}
    tags = {frozenset(one.split(", ")) for one in drawn}
    assert {frozenset(one.split(", ")) for one in possible} <= tags
