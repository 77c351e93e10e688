"""Weights files that are whole, damaged or more than weights."""

import io

import pytest
import torch

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
