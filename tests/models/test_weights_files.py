"""Weights files that are whole, damaged or more than weights."""

import io

import pytest
import torch
from safetensors.torch import save_file

from mlm_plugin.errors import UserError
from mlm_plugin.models.weights_files import read_weights


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_cut_pickle_is_a_user_error_wherever_it_is_cut(tmp_path, is_zip):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer, _use_new_zipfile_serialization=is_zip)
    whole = buffer.getvalue()
    path = tmp_path / "x.pt"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.pt"):
            read_weights(path)
    path.write_bytes(whole)
    assert torch.equal(read_weights(path)["a"], torch.ones(4))


def test_values_of_a_safetensors_file_are_not_read_before_they_are_used(tmp_path):
    """So an estimate can ask a checkpoint of 7 GB for its shapes."""
    pytest.importorskip("resource")  # elsewhere a memory-mapped file cannot be written to
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5_000_000)}, path)
    tensor = read_weights(path)["a"]
    with path.open("r+b") as file:
        file.seek(-4, io.SEEK_END)
        file.write(bytes(4))
    assert tensor[-1] == 0
