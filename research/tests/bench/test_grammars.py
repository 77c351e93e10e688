"""In the linked grammar a hidden word can be guessed from the others, in the free one not."""

from collections import Counter, defaultdict

import pytest

from mlm_plugin.pocket.captions import (
    BACKGROUND_PHRASES,
    BACKGROUND_TAGS,
    OPENINGS,
    POSITION_PHRASES,
    draw_said,
)
from mlm_plugin.pocket.concepts import REPORTED, TUNING, prompt_templates
from mlm_plugin.pocket.world import ATTRIBUTES, draw_scene, generator_of
from research.bench.grammars import GRAMMARS, LINKS, draw_linked_scene

HIDDEN = ("background", "companion", "position")


def accuracy(grammar, hidden):
    """Share of hidden values named by a frequency table over the rest of the caption."""
    rng = generator_of("grammar test")
    draw = {"free": draw_scene, "linked": draw_linked_scene}[grammar]
    captions = [draw_said(draw(rng), rng) for _ in range(6000)]
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
    texts = {name: GRAMMARS[name](REPORTED[0]) for name in ("free", "linked")}
    assert words_of(texts["linked"]) == words_of(texts["free"])
    for found in texts.values():
        assert len(set(found)) == 1000
        assert not tested & set(found)


@pytest.mark.parametrize("concept", [*REPORTED, *TUNING], ids=lambda concept: concept.name)
def test_disjoint_contexts_have_no_word_of_a_place_a_position_or_a_thing(concept):
    phrases = [
        *(phrase for options in BACKGROUND_PHRASES.values() for phrase in options),
        *(phrase for options in POSITION_PHRASES.values() for phrase in options),
        *BACKGROUND_TAGS.values(),
        *ATTRIBUTES["background"],
        *ATTRIBUTES["companion"],
    ]
    found = GRAMMARS["disjoint"](concept)
    assert len(found) == 1000
    assert words_of(found) & words_of(phrases) <= words_of(OPENINGS)
    assert words_of(found) >= {"small", "huge", "green", "striped"}


def words_of(texts):
    return {word for text in texts for word in text.replace(",", "").split()}
