"""A damaged state of an interrupted pretraining is set aside, and the pretraining starts again."""

import pickle

import pytest
import torch
from safetensors.torch import load_file

from mlm_plugin.config.pretraining import PretrainOptions
from mlm_plugin.pretraining.run import pretrain

QUICK = PretrainOptions(max_train_steps=2, batch_size=4, eval_every_n_steps=2, num_held_out=8)
DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no pickle"),
    "pickle": lambda path: path.write_bytes(pickle.dumps([print])),
    "list": lambda path: torch.save([1, 2], path),
    "other names": lambda path: torch.save({"made_for": None}, path),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "folder"])
def test_a_damaged_state_is_set_aside(toy_text_encoder, tmp_path, caplog, damage):
    state = tmp_path / "a.state.pt"
    if damage == "folder":
        state.mkdir()
    else:
        DAMAGES[damage](state)
    output = tmp_path / "a.safetensors"
    pretrain(toy_text_encoder, output, options=QUICK, show_progress=False)
    assert output.is_file()
    if damage != "other names":
        assert "a.state.pt is damaged" in caplog.text
        assert (tmp_path / "a.state.damaged").exists()


def test_after_a_damaged_state_the_result_is_that_of_a_first_run(toy_text_encoder, tmp_path):
    pretrain(toy_text_encoder, tmp_path / "a.safetensors", options=QUICK, show_progress=False)
    (tmp_path / "b.state.pt").write_bytes(b"half")
    pretrain(toy_text_encoder, tmp_path / "b.safetensors", options=QUICK, show_progress=False)
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_that_cannot_be_written_does_not_end_the_pretraining(
    toy_text_encoder, tmp_path, monkeypatch, caplog
):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64")

    monkeypatch.setattr("mlm_plugin.pretraining.run.torch.save", full)
    pretrain(toy_text_encoder, tmp_path / "a.safetensors", options=QUICK, show_progress=False)
    assert "this state of the pretraining could not be saved" in caplog.text
