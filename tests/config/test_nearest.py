"""A misspelt name leads to the nearest one."""

import pytest

from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.options import OPTIONS


def test_nearest_name_is_offered_only_if_near():
    assert did_you_mean("lerning_rate", OPTIONS) == "; did you mean learning_rate?"
    assert did_you_mean("zzzzzz", OPTIONS) == ""
    assert did_you_mean("x", []) == ""


@pytest.mark.parametrize("name", ["attn-mpl", "attn_mlp", "ATTN-MLP"])
def test_case_and_dashes_do_not_count_and_the_name_is_given_as_it_is_written(name):
    assert did_you_mean(name, ["full", "attn-mlp"]) == "; did you mean attn-mlp?"
    assert did_you_mean(name, ["full", "Attn_MLP"], prefix="--") == "; did you mean --Attn_MLP?"
