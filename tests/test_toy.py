"""The toy model is the same on every machine and in every process."""

from mlm_plugin.toy import build_toy_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_a_text_full_of_ties_gives_the_same_tokenizer_every_time(tmp_path):
    """Every pair of letters counts once, so every merge is a choice between ties."""
    words = [first + second for first in LETTERS for second in LETTERS][::7]
    built = set()
    for number in range(10):
        folder = tmp_path / str(number)
        build_toy_tokenizer(folder, words[number:] + words[:number])
        built.add((folder / "vocab.json").read_text() + (folder / "merges.txt").read_text())
    assert len(built) == 1
