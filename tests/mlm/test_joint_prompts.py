"""One concept draws as its set does; pairs are different concepts in contexts that suit two."""

import random
from collections import Counter
from itertools import permutations

import pytest

from mlm_plugin.mlm.prompts import JointPrompts, Member, PromptSet, draw_relation
from mlm_plugin.prompt_sets.english import is_dreambench
from mlm_plugin.prompt_sets.files import BUILTIN, joint_prompt_tables
from mlm_plugin.prompt_sets.grammar import SYNTAXES

TABLES = joint_prompt_tables()


def _members(*pairs, syntax="natural"):
    return [
        Member(PromptSet.load(name, syntax=syntax), text, text.split()[-1]) for name, text in pairs
    ]


ANIMALS = (("living", "sks dog"), ("living", "zwx cat"), ("object", "ohw vase"))


@pytest.mark.parametrize("joint_share", [0.0, 0.5, 1.0])
def test_a_single_member_draws_exactly_as_its_set(joint_share):
    ((prompt_set, text, _),) = members = _members(("living", "sks dog"))
    joint, alone = random.Random(3), random.Random(3)
    prompts = JointPrompts(members, joint_share=joint_share)
    for _ in range(50):
        assert prompts.sample(joint).text == prompt_set.sample(alone, text)
    assert joint.getstate() == alone.getstate()


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_joint_prompts_hold_two_different_concepts_and_every_pair_comes(syntax):
    prompts = JointPrompts(_members(*ANIMALS, syntax=syntax), joint_share=1)
    rng = random.Random(0)
    texts = [text for _, text in ANIMALS]
    phrases = {
        f"{first} {relation} {second}": (first, second)
        for first, second in permutations(texts, 2)
        for relation in TABLES["relations"]["things"]
    }
    pairs = Counter()
    for _ in range(400):
        prompt = prompts.sample(rng).text
        assert sorted(map(prompt.count, texts)) == [0, 1, 1], prompt
        (phrase,) = (phrase for phrase in phrases if phrase in prompt)
        pairs[phrases[phrase]] += 1
        assert not is_dreambench(prompt.replace(phrase, "{}"))
    assert set(pairs) == set(permutations(texts, 2))


def test_the_share_of_joint_prompts_is_as_asked_and_concepts_come_alike():
    rng = random.Random(1)
    texts = [text for _, text in ANIMALS]
    for share in (0.0, 0.3, 1.0):
        prompts = JointPrompts(_members(*ANIMALS), joint_share=share)
        drawn = [prompts.sample(rng).text for _ in range(600)]
        held = [[text for text in texts if text in prompt] for prompt in drawn]
        assert sum(len(h) == 2 for h in held) / 600 == pytest.approx(share, abs=0.06)
        counts = Counter(text for h in held for text in h)
        assert max(counts.values()) < 1.3 * min(counts.values())


def test_joint_contexts_come_from_families_that_suit_two(monkeypatch):
    families = []
    draw = PromptSet.draw

    def noting(self, rng):
        context = draw(self, rng)
        families.append(context.family)
        return context

    monkeypatch.setattr(PromptSet, "draw", noting)
    rng = random.Random(0)
    prompts = JointPrompts(_members(*ANIMALS), joint_share=1)
    for _ in range(400):
        prompts.sample(rng)
    assert set(families) == set(TABLES["families"]["things"])


def test_a_style_comes_second_and_two_styles_are_blended():
    rng = random.Random(0)
    mixed = JointPrompts(_members(("style", "sks art"), ("living", "zwx cat")), joint_share=1)
    styles = JointPrompts(_members(("style", "sks art"), ("style", "zwx art")), joint_share=1)
    for _ in range(50):
        assert "zwx cat in the style of sks art" in mixed.sample(rng).text
        prompt = styles.sample(rng).text
        assert any(f" art {how} " in prompt for how in TABLES["relations"]["styles"])


def test_a_caption_that_names_both_is_not_doubled():
    captions = ["sks dog beside a Zwx cat", "a photo of sks dog at home", "zwx cat on a chair"]
    texts = ["sks dog", "zwx cat"]
    members = [
        Member(PromptSet.from_captions(captions, concept=text, others=texts), text)
        for text in texts
    ]
    rng = random.Random(0)
    for _ in range(60):
        prompt = JointPrompts(members, joint_share=1).sample(rng).text.lower()
        assert [prompt.count(text) for text in texts] == [1, 1]


def test_every_named_family_is_one_of_a_built_in_set():
    known = {family for name in BUILTIN for family in PromptSet.load(name).counts()}
    assert set(TABLES["relations"]) == set(TABLES["families"])
    for families in TABLES["families"].values():
        assert set(families) <= known
    for name in set(BUILTIN) - {"style"}:
        for syntax in SYNTAXES:
            counts = PromptSet.load(name, syntax=syntax).only(TABLES["families"]["things"]).counts()
            assert 12 <= len(counts) <= len(TABLES["families"]["things"])


def test_any_relation_may_join_two():
    rng = random.Random(0)
    relations = {draw_relation(rng) for _ in range(300)}
    assert relations == set(TABLES["relations"]["things"])
    assert draw_relation(rng, kind="thing_in_style") == "in the style of"


@pytest.mark.parametrize(
    ("caption", "is_joint"),
    [
        ("sks dog beside a zwx caterpillar", True),
        ("sks dog beside ZWX cat", False),
        ("sks dog and xzwx cat", True),
    ],
)
def test_another_concept_is_found_in_a_context_as_whole_words(caption, is_joint):
    concepts = ("sks dog", "zwx cat")
    sets = [PromptSet.from_captions([caption], concept="sks dog"), PromptSet.load("living")]
    members = [Member(prompt_set, text) for prompt_set, text in zip(sets, concepts, strict=True)]
    prompts, rng = JointPrompts(members, joint_share=1), random.Random(0)
    drawn = {prompts.sample(rng).text for _ in range(40)}
    of_caption = [text for text in drawn if "beside" in text and "zwx" in text.lower()]
    of_caption += [text for text in drawn if "xzwx" in text]
    held = [text for text in of_caption if text == caption]
    assert bool(held) != is_joint


@pytest.mark.parametrize("joint_share", [0.0, 1.0])
def test_the_teacher_never_reads_a_concept_that_a_caption_names_besides(joint_share):
    captions = ["sks dog beside zwx cat in the snow", "sks dog and sks dog at home", "one ohw vase"]
    texts = ["sks dog", "zwx cat", "ohw vase"]
    members = [
        Member(
            PromptSet.from_captions(captions[:2] if i < 2 else captions[2:], concept=text),
            text,
            text.split()[-1],
        )
        for i, text in enumerate(texts)
    ]
    prompts, rng = JointPrompts(members, joint_share=joint_share), random.Random(0)
    pairs = {prompts.sample(rng) for _ in range(60)}
    if joint_share == 0:
        assert (
            "sks dog beside zwx cat in the snow",
            "dog beside cat in the snow",
        ) in pairs
        assert ("sks dog and sks dog at home", "dog and dog at home") in pairs
    for pair in pairs:
        assert not any(text in pair.class_text for text in texts), pair
