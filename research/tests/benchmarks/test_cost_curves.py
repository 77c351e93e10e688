"""Cost curves: the choice of points, table and plots."""

import json
import sys
from types import SimpleNamespace

import pytest

from research.benchmarks import cost_curves as curves


def point(ratio):
    return {
        "device": "cpu (x86_64)",
        "ratio_time": ratio,
        "ratio_cpu_time": ratio,
        "ratio_memory": 1.01,
        "median_seconds": {"on": ratio, "off": 1.0},
        "median_cpu_seconds": {"on": ratio, "off": 1.0},
        "peak_bytes": {"on": 101, "off": 100},
        "mlm_tokens_per_prompt": 17,
    }


def test_one_setting_changes_at_a_time():
    args = SimpleNamespace(
        shape="sdxl",
        mlm_batch_sizes=[8, 4],
        prompt_tokens=[17],
        resolutions=[512, 256],
        text_encoders=[2, 1],
    )
    points = [(axis.option, settings) for axis, settings in curves.points_of(curves.axes_of(args))]
    base = {
        "mlm_batch_size": 8,
        "mlm_prompt_tokens": 17,
        "resolution": 512,
        "num_text_encoders": 2,
    }
    assert points == [
        ("mlm_batch_size", base | {"mlm_batch_size": 4}),
        ("mlm_batch_size", base),
        ("resolution", base | {"resolution": 256}),
        ("resolution", base),
        ("num_text_encoders", base | {"num_text_encoders": 1}),
        ("num_text_encoders", base),
    ]


def test_points_that_are_there_become_table_and_plots(tmp_path, monkeypatch, capsys):
    for number in (4, 8):
        name = f"sd15-mlm_batch_size_{number}-mlm_prompt_tokens_17-resolution_64.json"
        (tmp_path / "points").mkdir(exist_ok=True)
        (tmp_path / "points" / name).write_text(json.dumps(point(1 + number / 100)))
    flags = ["--shape", "sd15", "--output", str(tmp_path), "--resolutions", "64"]
    flags += ["--prompt_tokens", "17", "--mlm_batch_sizes", "8", "4"]
    monkeypatch.setattr(sys, "argv", ["cost_curves.py", *flags])
    curves.main()
    row = "| MLM prompts per step | 4 | +4.0 % | +4.0 % | +1.0 % | 1.04 | 1.00 |"
    assert row in capsys.readouterr().out
    assert row in (tmp_path / "curves.md").read_text()
    html = (tmp_path / "curves.html").read_text()
    assert html.count('<g class="curve">') == 2, "time and memory"
    assert "MLM prompts per step 8: +8.0 % processor time" in html
    (curve,) = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert [p["x"] for p in curve["points"]] == [4, 8]


def test_options_of_the_step_benchmark_go_on_to_it():
    args = curves.parse(["--shape", "sdxl", "--output", "x", "--mixed_precision", "bf16"])
    assert args.more == ["--mixed_precision", "bf16"]


def test_nothing_to_measure_is_one_line(tmp_path, monkeypatch):
    single = ["--mlm_batch_sizes", "8", "--prompt_tokens", "17", "--resolutions", "64"]
    flags = ["--shape", "sd15", "--output", str(tmp_path), *single]
    monkeypatch.setattr(sys, "argv", ["cost_curves.py", *flags])
    with pytest.raises(SystemExit, match="nothing to measure"):
        curves.main()
