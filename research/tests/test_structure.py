"""The numbers that describe the package are counted, not guessed."""

from pathlib import Path

from research.structure import functions_of, imports_across, main

SOURCE = """
from mlm_plugin.errors import UserError


class A:
    def method(self, a, *, b, c=1):
        def inner(x):
            return x
        return inner
"""


def test_parameters_and_lines_of_every_function_are_counted(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    found = {f.place.split()[-1]: f[1:] for f in functions_of(path, tmp_path)}
    assert found == {"method": (3, 4), "inner": (1, 2)}


def test_an_import_from_another_part_counts_and_one_from_its_own_does_not(tmp_path):
    package = tmp_path / "mlm_plugin"
    (package / "data").mkdir(parents=True)
    for name in ("data/a.py", "errors.py"):
        (package / name).write_text(SOURCE)
    assert imports_across(package / "data" / "a.py", package)
    assert not imports_across(package / "errors.py", package)


def test_the_package_keeps_its_functions_short_and_their_parameters_few(capsys):
    main([str(Path(__file__).parents[2])])
    printed = capsys.readouterr().out
    assert "3 functions of more than 6 parameters" in printed
    assert "0 functions of more than 60 lines" in printed
