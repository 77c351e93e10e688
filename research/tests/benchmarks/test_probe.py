"""The probe sees the steps of any trainer and ends it after the last one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from research.benchmarks import peers, probe

ROOT = Path(__file__).parents[3]
TRAINER = """
import sys
import torch

weight = torch.nn.Parameter(torch.zeros(1000, 1000))
optimizer = torch.optim.AdamW([weight])
for step in range(int(sys.argv[1])):
    weight.sum().backward()
    optimizer.step()
open(sys.argv[2], "w").close()
"""


@pytest.fixture
def probed(tmp_path):
    def probed(num_steps, *flags):
        script, report = tmp_path / "trainer.py", tmp_path / "report.json"
        script.write_text(TRAINER)
        ended = tmp_path / "ended"
        command = [sys.executable, ROOT / "research" / "benchmarks" / "probe.py", report, *flags]
        subprocess.run(
            [*map(str, [*command, "--", script, num_steps, ended])],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return json.loads(report.read_text()), ended.exists()

    return probed


def test_a_script_is_ended_after_the_last_step_that_counts(probed):
    report, ended = probed(1000, "--num_warmup", "2", "--num_steps", "5")
    assert not ended
    assert len(report["seconds"]) == len(report["cpu_seconds"]) == 3
    assert all(seconds > 0 for seconds in report["seconds"])
    weight = 4 * 1000 * 1000
    assert report["peak_bytes"] > 4 * weight  # itself, its gradient and two moments
    assert report["versions"]["torch"]


def test_without_a_number_of_steps_the_script_runs_to_its_end(probed):
    report, ended = probed(3)
    assert ended
    assert len(report["seconds"]) == 2, "the first is warm-up"


def test_fields_of_a_status_are_kilobytes():
    assert probe.kilobytes("VmHWM", "Name:\tpython\nVmHWM:\t   1234 kB\nVmRSS:\t 9 kB\n") == 1234
    with pytest.raises(ValueError, match="no VmPeak"):
        probe.kilobytes("VmPeak", "Name:\tpython\n")


def test_examples_get_the_modules_of_kohyas_trainers(monkeypatch):
    import peft

    monkeypatch.setattr(peft, "LoraConfig", peft.LoraConfig)  # restored afterwards
    probe.adapt_to_kohyas_modules(peers.KOHYAS_MODULES)
    unet = peft.LoraConfig(r=4, target_modules=["to_k", "to_q"])
    other = peft.LoraConfig(r=4, target_modules=["lin1"])
    assert {"proj_in", "ff.net.2"} < set(unet.target_modules)
    assert set(other.target_modules) == {"lin1"}


def test_steps_before_the_warm_up_have_their_own_peak(tmp_path, monkeypatch):
    levels = iter([900, 200, 300])
    monkeypatch.setattr(probe, "peak_bytes", lambda: next(levels))
    monkeypatch.setattr(probe, "reset_peak", lambda: None)
    notes = probe.Notes(tmp_path / "r.json", num_steps=0, num_warmup=1)
    for _ in range(3):
        notes.after_step(SimpleNamespace())
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["loading_peak_bytes"], report["peak_bytes"]) == (900, 300)
