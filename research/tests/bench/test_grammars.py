"""In the linked grammar a hidden word can be guessed from the others, in the free one not."""

from collections import Counter, defaultdict

import pytest

from mlm_plugin.pocket.captions import draw_said
from mlm_plugin.pocket.concepts import REPORTED, contexts, prompt_templates
from mlm_plugin.pocket.world import ATTRIBUTES, generator_of
from research.bench.grammars import GRAMMARS, LINKS

HIDDEN = ("background", "companion", "position")


def accuracy(grammar, hidden):
    """Share of hidden values named by a frequency table over the rest of the caption."""
    rng = generator_of("grammar test")
    captions = [draw_said(GRAMMARS[grammar](rng), rng) for _ in range(6000)]
    captions = [said for said in captions if hidden in said]
    half = len(captions) // 2
    table = defaultdict(Counter)
    for said in captions[:half]:
        table[_rest(said, hidden)][said[hidden]] += 1
    right = 0
    for said in captions[half:]:
        guesses = table[_rest(said, hidden)].most_common(1)
        right += bool(guesses) and guesses[0][0] == said[hidden]
    return right / (len(captions) - half)


def _rest(said, hidden):
    return tuple(said.get(n) for n in ("background", "companion", "position") if n != hidden)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_words_can_be_guessed_only_where_words_are_linked(hidden):
    chance = 1 / len(ATTRIBUTES[hidden])
    assert accuracy("free", hidden) < chance + 0.15
    assert accuracy("linked", hidden) > accuracy("free", hidden) + 0.3
    assert accuracy("linked", hidden) > 0.55


def test_every_place_has_its_own_things():
    assert set(LINKS) == set(ATTRIBUTES["background"])
    assert len(set(LINKS.values())) == len(LINKS)


def test_both_grammars_have_the_same_words_and_leave_out_the_test_prompts():
    tested = {caption.text for caption in prompt_templates(REPORTED[0])}
    texts = {name: contexts(REPORTED[0], draw=draw) for name, draw in GRAMMARS.items()}
    words = {
        name: {word for text in found for word in text.replace(",", "").split()}
        for name, found in texts.items()
    }
    assert words["linked"] == words["free"]
    for found in texts.values():
        assert len(set(found)) == 1000
        assert not tested & set(found)
