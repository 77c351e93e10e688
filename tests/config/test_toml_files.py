"""TOML files of users: read, or one line that says why not."""

import pytest

from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError


def test_a_toml_with_byte_order_mark_and_windows_lines_is_read(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\n[b]\r\nc = 'd'\r\n")
    assert read_toml(path) == {"a": 1, "b": {"c": "d"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"a = \xff", "UTF-8"),
        (b"a =", "not valid TOML"),
        (b'a = "C:\\Users"', "single quotes"),
    ],
)
def test_an_unusable_toml_is_one_line_with_its_name(tmp_path, content, message):
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.toml") as caught:
        read_toml(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
