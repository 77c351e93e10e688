"""Every prompt of the built-in sets is enumerated once and read by the rules of English."""

import json
import logging
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from mlm_plugin.commands.prompts import estimated_tokens, run_prompts
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.prompts import PromptSet
from mlm_plugin.prompt_sets import english, grammar
from mlm_plugin.prompt_sets.english import (
    FUNCTION_WORDS,
    NEUTRAL_WORDS,
    category_of,
    correct_articles,
    dreambench_prompts,
    is_dreambench,
    normal_form,
    subjects,
)
from mlm_plugin.prompt_sets.files import BUILTIN, TAG_SETS
from mlm_plugin.prompt_sets.grammar import SYNTAXES


@pytest.fixture(scope="module", params=[(n, s) for n in BUILTIN for s in SYNTAXES], ids="-".join)
def enumerated(request):
    name, syntax = request.param
    prompt_set = PromptSet.load(name, syntax=syntax)
    # without the filter, so that the data itself is tested
    raw = {f.name: [f.text(i) for i in range(f.size)] for f in prompt_set._families}
    return prompt_set, raw


def lines(path, *texts):
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def every_text(raw):
    return [text for texts in raw.values() for text in texts]


# --- The built-in sets


def test_counts_are_the_distinct_prompts_of_the_enumeration(enumerated):
    prompt_set, raw = enumerated
    assert prompt_set.counts() == {name: len(set(texts)) for name, texts in raw.items()}
    texts = every_text(raw)
    assert len(set(texts)) == len(texts)
    if prompt_set.name in ("living", "person", "object"):
        assert len(texts) >= 30_000


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_illustration_is_tags_with_and_without_quality_in_front(syntax):
    prompt_set = PromptSet.load("illustration", syntax=syntax)
    rng = random.Random(1)
    texts = [prompt_set.draw(rng).text for _ in range(4000)]
    assert len(set(texts)) > 3000
    for text in texts:
        assert text.count("{}") == 1, text
        tags = text.split(", ")
        assert all(tag and tag == tag.strip().lower() for tag in tags), text
        assert not any(tag.startswith(("a ", "an ", "the ")) for tag in tags), text
        assert len(set(tags)) == len(tags), text
        assert tags[-1] != "{}", text  # something is said after the concept
    share = sum("quality" in text for text in texts) / len(texts)
    assert 0.4 < share < 0.6


def test_every_family_and_list_of_illustration_can_be_drawn():
    """Some hundred texts of every family, whose sizes go into the millions."""
    prompt_set = PromptSet.load("illustration")
    for family in prompt_set._families:
        texts = [family.text(i) for i in range(0, family.size, max(1, family.size // 500))]
        assert len(set(texts)) > 0.99 * len(texts), family.name


def test_no_built_in_data_makes_a_dreambench_prompt(enumerated):
    prompt_set, raw = enumerated
    texts = every_text(raw)
    assert [text for text in texts if is_dreambench(text)] == []
    rng = random.Random(3)
    drawn = (prompt_set.draw(rng).text for _ in range(300))
    assert not any(is_dreambench(text) for text in drawn)


def test_built_in_texts_are_clean_english(enumerated):
    _, raw = enumerated
    pairs = set()
    for text in every_text(raw):
        assert text.count("{}") == 1, text
        assert text == text.lower(), text
        assert text == text.strip(), text
        words = text.replace(",", " ,").split(" ")
        assert "" not in words, text
        pairs.update(zip(words, words[1:], strict=False))
    assert [pair for pair in pairs if pair[0] == pair[1]] == [], "doubled words"
    wrong = [pair for pair in pairs if pair[0] in ("a", "an") and pair[0] != article(pair[1])]
    assert wrong == []
    assert [pair for pair in pairs if pair[0] in ("a", "an", "the") and pair[1] == ","] == []
    odd = {letter for pair in pairs for letter in "".join(pair)} - set("abcdefghijklmnopqrstuvwxyz")
    assert odd <= set("0123456789{},'-"), odd


def article(word):
    """Reimplemented by spelling alone, so that a wrong list in the package is found."""
    if word == "{}":
        return None
    if re.match(r"(uni[cfqtv]|us[aeiu]|ut[eio]|eu|one|once|ukulele|ufo)", word):
        return "a"
    return "an" if re.match(r"([aeiou]|hour|heir|honest|honor|led\b|x-|8)", word) else "a"


def test_the_concept_stands_without_an_article_unless_an_adjective_brings_it(enumerated):
    _, raw = enumerated
    assert not any(re.search(r"\b(an?|the) \{\}", text) for text in every_text(raw))


def test_tags_are_comma_separated_and_hold_no_leading_article(enumerated, request):
    _, raw = enumerated
    if "tags" in request.node.callspec.params["enumerated"]:
        for text in every_text(raw):
            tags = text.split(", ")
            assert len(tags) >= 2, text
            assert not any(tag.startswith(("a ", "an ", "the ")) for tag in tags), text


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("name", BUILTIN)
def test_families_are_drawn_flatter_than_their_sizes(name, syntax):
    prompt_set = PromptSet.load(name, syntax=syntax)
    counts, shares = prompt_set.counts(), prompt_set.shares()
    assert len(counts) >= 10
    assert sum(shares.values()) == pytest.approx(1)
    largest, smallest = max(counts, key=counts.get), min(counts, key=counts.get)
    ratio = counts[largest] / counts[smallest]
    assert shares[largest] / shares[smallest] == pytest.approx(ratio**0.25)
    rng = random.Random(0)
    drawn = Counter(prompt_set.draw(rng).family for _ in range(3000))
    for family, share in shares.items():
        assert drawn[family] / 3000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_drawn_prompt_is_an_enumerated_one_behind_a_neutral_prefix(syntax):
    prompt_set = PromptSet.load("building", syntax=syntax)
    known = {normal_form(context.text) for context in prompt_set.all()}
    rng = random.Random(1)
    texts = [prompt_set.draw(rng).text for _ in range(500)]
    assert all(text.count("{}") == 1 for text in texts)
    assert all(normal_form(text) in known for text in texts)
    prefixed = sum(bool(re.search(r"^a (photo|picture)|photo", text)) for text in texts)
    assert 0 < prefixed < 500


def test_the_same_seed_draws_the_same_prompts_in_any_process():
    script = (
        "import json, random; from mlm_plugin.mlm.prompts import PromptSet\n"
        "s, r = PromptSet.load('living'), random.Random(5)\n"
        "print(json.dumps([s.sample(r, 'sks dog') for _ in range(20)]))"
    )
    prompt_set, rng = PromptSet.load("living"), random.Random(5)
    here = [prompt_set.sample(rng, "sks dog") for _ in range(20)]
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert json.loads(there.stdout) == here
    assert here != [prompt_set.sample(random.Random(6), "sks dog") for _ in range(20)]


def test_drawing_leaves_the_global_random_stream_alone():
    random.seed(0)
    before = random.getstate()
    PromptSet.load("person").draw(random.Random(0))
    assert random.getstate() == before


def test_every_shipped_list_and_file_is_used():
    used = {f"{name}.toml" for name in (*BUILTIN, *TAG_SETS)}
    slots, names = set(), set()
    for path in grammar.SETS.glob("*.toml"):
        tables = read_toml(path)
        grammar.check_schema(tables, where=path.name)
        used.update(tables.get("include", ()))
        names.update(tables.get("lists", ()))
        slots.update(re.findall(r"\{(\w+)\}", path.read_text(encoding="utf-8")))
    assert used == {path.name for path in grammar.SETS.glob("*.toml")}
    assert names == slots


# --- English


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a umbrella", "an umbrella"),
        ("an university and a hour", "a university and an hour"),
        ("a unicorn, a ugly house", "a unicorn, an ugly house"),
        ("a one-story house in a 8-bit game", "a one-story house in an 8-bit game"),
        ("an t-shirt, a x-ray, an used car", "a t-shirt, an x-ray, a used car"),
        ("a {} in an {}", "a {} in an {}"),
        ("panda bear", "panda bear"),
    ],
)
def test_articles_follow_the_sound_of_the_next_word(text, expected):
    assert correct_articles(text) == expected


def test_words_for_masking_are_lower_case_and_apart():
    assert {"a", "of", "the", "with"} <= FUNCTION_WORDS
    assert {"photo", "picture"} <= NEUTRAL_WORDS
    assert not FUNCTION_WORDS & NEUTRAL_WORDS
    assert not {"behind", "under", "dog", "red"} & (FUNCTION_WORDS | NEUTRAL_WORDS)
    assert all(word == word.lower().strip() for word in FUNCTION_WORDS | NEUTRAL_WORDS)


# --- DreamBench


def test_the_dreambench_lists_hold_25_prompts_each_of_which_15_are_shared():
    living, objects = dreambench_prompts("living"), dreambench_prompts("object")
    assert len(set(living)) == len(set(objects)) == 25
    assert len(set(living) & set(objects)) == 15
    assert all(text.count("{}") == 1 for text in living + objects)
    with pytest.raises(UserError, match="living, object"):
        dreambench_prompts("style")


@pytest.mark.parametrize(
    "text",
    [
        "a photo of {} on the beach",
        "{}, beach",
        "A picture of a {}, with the Eiffel Tower in the background!",
        "red {}",
        "{} wearing a Santa hat",
    ],
)
def test_a_dreambench_prompt_is_recognised_in_another_dress(text):
    assert is_dreambench(text)


@pytest.mark.parametrize(
    "text", ["{} at the eiffel tower", "{} on a sandy beach", "{}", "a {} dog"]
)
def test_other_prompts_are_not_taken_for_dreambench(text):
    assert not is_dreambench(text)


def test_the_filter_keeps_dreambench_out_of_a_users_toml(tmp_path):
    path = lines(
        tmp_path / "own.toml",
        "[prefixes]",
        'natural = ["a photo of {}"]',
        "[lists]",
        'color = ["red", "purple", "amber"]',
        "[families.colors]",
        'natural = ["a {color} {}"]',
    )
    prompt_set = PromptSet.load(path)
    assert [context.text for context in prompt_set.all()] == ["an amber {}"]
    rng = random.Random(0)
    assert {prompt_set.draw(rng).text for _ in range(50)} == {"a photo of an amber {}"}


def test_a_set_of_nothing_but_dreambench_is_an_error(tmp_path):
    path = lines(tmp_path / "own.toml", "[families.x]", 'natural = ["a red {}"]')
    with pytest.raises(UserError, match="only DreamBench"):
        PromptSet.load(path).draw(random.Random(0))


# --- The user's own prompts


def test_a_text_file_is_taken_as_written(tmp_path):
    path = lines(tmp_path / "mine.txt", "# mine", "a {} On An Car", "", "{} in {brackets}")
    prompt_set = PromptSet.load(path)
    assert [c.text for c in prompt_set.all()] == ["a {} On An Car", "{} in {brackets}"]
    rng = random.Random(0)
    drawn = {prompt_set.sample(rng, "sks") for _ in range(50)}
    assert drawn == {"a sks On An Car", "sks in {brackets}"}


@pytest.mark.parametrize("bad", ["no slot", "{} and {}"])
def test_a_text_line_without_exactly_one_slot_is_named_by_file_and_line(tmp_path, bad):
    path = lines(tmp_path / "mine.txt", "{} at home", bad)
    with pytest.raises(UserError, match=r"mine\.txt, line 2: [02] slots"):
        PromptSet.load(path)


def test_own_lines_from_dreambench_stay_but_are_announced(tmp_path, caplog):
    path = lines(tmp_path / "mine.txt", "{} at home", "a {} in the snow")
    with caplog.at_level(logging.WARNING):
        prompt_set = PromptSet.load(path)
    assert "1 of 2 prompts are DreamBench" in caplog.text
    assert len(list(prompt_set.all())) == 2


def test_a_users_toml_may_include_shipped_words_and_replace_them(tmp_path):
    path = lines(
        tmp_path / "own.toml",
        'include = ["words.toml"]',
        "temperature = 1",
        "[lists]",
        'color = ["amber"]',
        "[families.rooms]",
        'natural = ["{} in {room}"]',
        "[families.painted]",
        "weight = 2",
        "prefix = false",
        'natural = ["a {color} {}"]',
        'tags = ["{}, {color}"]',
    )
    prompt_set = PromptSet.load(path)
    rooms = prompt_set.counts()["rooms"]
    assert rooms > 20
    assert prompt_set.counts()["painted"] == 1
    assert prompt_set.shares()["painted"] == pytest.approx(2 / (2 + rooms))
    assert PromptSet.load(path, syntax="tags").counts() == {"painted": 1}


@pytest.mark.parametrize("settings", ["weight = 1e308", "weight = 1e-308"])
@pytest.mark.parametrize("temperature", [1e-3, 1e300])
def test_extreme_shares_can_be_drawn(tmp_path, settings, temperature):
    head = f"temperature = {temperature}\n[lists]\nn = ['1', '2', '3']\n"
    families = (f"[families.f{i}]\n{settings}\nnatural = ['{{}} {i}{{n}}{{n}}']" for i in range(3))
    prompt_set = PromptSet.load(lines(tmp_path / "own.toml", head, *families))
    assert sum(prompt_set.shares().values()) == pytest.approx(1)
    rng = random.Random(0)
    assert {prompt_set.draw(rng).family for _ in range(100)} == {"f0", "f1", "f2"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("famlies = 1", "unknown key 'famlies'.*did you mean families"),
        ("[families.x]\nnatrual = ['{}']", "unknown key 'natrual'.*did you mean natural"),
        (
            "[families.x]\nnatural = ['{} {colr}']\n[lists]\ncolor = ['red']",
            "no list 'colr'.*did you mean color",
        ),
        ("[families.x]\nnatural = ['a dog']", "exactly once"),
        ("[families.x]\nnatural = ['{} {a}']\n[lists]\na = ['{}']", "not in lists"),
        (
            "[families.x]\nnatural = ['{} {a}']\n[lists]\na = ['{b}']\nb = ['{a}']",
            "contains itself",
        ),
        ("[families.x]\nnatural = ['{} {a}']\n[lists]\na = ['b', 'b']", "'b' is there twice"),
        ("[families.x]\nnatural = ['{} {a}']\n[lists]\na = []", "expected a list of texts"),
        ("[families.x]\nnatural = ['{} {my list}']", r"\[families.x\] natural: .*a slot is"),
        ("[families.x]\nnatural = ['{} {a']", "a slot is"),
        ("[families.x]\nnatural = ['{} {a}']\n[lists]\na = ['b {c-d}']", "lists.a: .*a slot is"),
        ("[families.x]\nnatural = ['{}']\n[prefixes]\nnatural = ['a {b} {}']", "takes no lists"),
        ("[families.x]\nweight = 0\nnatural = ['{}']", "number above 0"),
        ("[families.x]\nweight = inf\nnatural = ['{}']", r"\[families.x\] weight: .*above 0"),
        ("[families.x]\nweight = nan\nnatural = ['{}']", "number above 0"),
        ("[families.x]\nprefix = 1\nnatural = ['{}']", "neither true nor false"),
        ("[families.x]\nweight = 1", "no templates"),
        ("[families.x]\ntags = ['{}, red']", "no family has natural templates"),
        ("lists = 3", "expected a table"),
        ("temperature = -1", "number above 0"),
        ("temperature = inf", "number above 0"),
        ("include = ['own.toml']", "includes itself"),
        ("include = ['wrds.toml']", "neither beside it nor one of"),
        ("[[", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_toml_is_one_clear_line(tmp_path, body, message):
    path = lines(tmp_path / "own.toml", body)
    with pytest.raises(UserError, match=message) as caught:
        PromptSet.load(path)
    assert "own.toml" in str(caught.value)


def test_an_unknown_set_names_the_nearest_and_the_list(tmp_path):
    with pytest.raises(UserError, match="living, person, object.*did you mean living"):
        PromptSet.load("livng")
    with pytest.raises(UserError, match="no file"):
        PromptSet.load(tmp_path / "gone.txt")
    with pytest.raises(UserError, match="natural, tags"):
        PromptSet.load("living", syntax="booru")


def test_captions_become_contexts_and_useless_ones_are_counted(caplog):
    captions = [
        "A photo of  SKS dog at home",
        "sks dog",
        "a cat",
        "a sks doghouse",
        "sks dog, sks dog",
    ]
    with caplog.at_level(logging.WARNING):
        prompt_set = PromptSet.from_captions(captions, concept="sks dog")
    assert [c.text for c in prompt_set.all()] == ["A photo of {} at home", "{}, sks dog"]
    assert "3 of 5 captions" in caplog.text
    assert prompt_set.counts() == {"captions": 2}


def test_captions_without_the_concept_are_an_error():
    with pytest.raises(UserError, match="none of the 2 captions holds 'sks dog'"):
        PromptSet.from_captions(["a dog", "sks dog"], concept="sks dog")


def test_apostrophes_of_phones_are_written_as_tokenizers_know_them():
    """The s after a typographic one would be a word of its own, to be masked."""
    prompt_set = PromptSet.from_captions(["sks dog in the king\u2019s garden"], concept="sks dog")
    assert prompt_set.sample(random.Random(0), "a cat") == "a cat in the king's garden"


def test_captions_of_the_other_concepts_are_no_reason_for_a_warning(caplog):
    captions = ["a photo of sks dog", "zwx cat at home", "sks dog next to zwx cat", "a bird"]
    with caplog.at_level(logging.WARNING):
        prompt_set = PromptSet.from_captions(captions, concept="sks dog", others=["zwx cat"])
    assert [c.text for c in prompt_set.all()] == ["a photo of {}", "{} next to zwx cat"]
    assert "1 of 4 captions" in caplog.text
    caplog.clear()
    PromptSet.from_captions(captions[:3], concept="zwx cat", others=["sks dog"])
    assert caplog.text == ""
    with pytest.raises(UserError, match="none of the 4 captions holds 'ohw vase'"):
        PromptSet.from_captions(captions, concept="ohw vase", others=["sks dog", "zwx cat"])


def test_a_set_can_be_narrowed_to_some_families():
    whole = PromptSet.load("living")
    some = whole.only(["places", "weather", "surfaces"])
    assert some.counts() == {name: whole.counts()[name] for name in ("places", "weather")}
    shares, parts = some.shares(), whole.shares()
    ratio = parts["places"] / parts["weather"]
    assert shares["places"] / shares["weather"] == pytest.approx(ratio)
    assert whole.only(["surfaces"]) is whole


# --- Categories and subjects


@pytest.mark.parametrize(
    ("class_token", "category"),
    [
        ("dog", "living"), ("Golden Retriever", "living"), ("cats", "living"),
        ("duck toy", "object"), ("stuffed animal", "object"), ("sneakers", "object"),
        ("woman", "person"), ("police officer", "person"), ("1girl", "person"),
        ("old castle", "building"), ("churches", "building"),
        ("anime style", "style"), ("watercolor painting", "style"),
        ("rc_car", "object"), ("zorblax", "object"), ("", "object"),
    ],
)  # fmt: skip
def test_a_class_word_finds_its_category(class_token, category):
    assert category_of(class_token) == category


def test_subjects_are_many_and_find_their_own_category():
    assert sum(len(set(subjects(category))) for category in BUILTIN) >= 300
    for category in BUILTIN:
        for subject in subjects(category):
            assert subject == subject.lower()
            assert category_of(subject) == category, subject
    with pytest.raises(UserError, match="living, person"):
        subjects("plants")


def test_no_class_word_is_in_two_categories():
    classes = english._subject_table()["classes"]
    assert set(classes) == set(BUILTIN)
    words = Counter(word for known in classes.values() for word in known)
    assert [word for word, times in words.items() if times > 1] == []


# --- mlm-plugin prompts


def test_the_command_prints_the_same_prompts_for_the_same_seed(capsys):
    argv = "--prompt_set living --placeholder_token sks --class_token dog -n 20 --seed 0".split()
    assert run_prompts(argv) == 0
    first = capsys.readouterr().out
    run_prompts(argv)
    assert capsys.readouterr().out == first
    assert len(first.splitlines()) == 20
    assert all(line.count("sks dog") == 1 for line in first.splitlines())
    run_prompts([*argv[:-1], "1"])
    assert capsys.readouterr().out != first


def test_the_command_chooses_the_set_by_class_and_shows_statistics(capsys):
    run_prompts(["--class_token", "castle", "--stats"])
    out = capsys.readouterr().out
    counts = PromptSet.load("building").counts()
    assert re.search(rf"^views +{counts['views']:,} ", out, re.MULTILINE)
    assert f"{sum(counts.values()):,}" in out.splitlines()[-2]


def test_long_words_and_prompts_are_reported(tmp_path, capsys):
    path = lines(tmp_path / "mine.txt", "{} " + "blue " * 74, "{} at home")
    run_prompts(["--prompt_set", str(path), "--stats", "--placeholder_token", "x" * 300])
    err = capsys.readouterr().err
    assert "the word 'xxx" in err
    assert "2 prompts have over 75 tokens" in err
    run_prompts(["--prompt_set", "living", "--placeholder_token", "sks", "--class_token", "dog"])
    assert capsys.readouterr().err == ""


def test_the_command_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(UserError, match="-n"):
        run_prompts(["-n", "0"])
    with pytest.raises(UserError, match="--tokenizer"):
        run_prompts(["--tokenizer", str(tmp_path)])


def test_a_tokenizer_makes_the_lengths_exact(tmp_path, capsys):
    pytest.importorskip("transformers")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{one}</w>" for one in letters),
        "do",
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines(tmp_path / "merges.txt", "#version: 0.2", "d o")
    path = lines(tmp_path / "mine.txt", "{} dog")
    argv = ["--prompt_set", str(path), "--stats", "--tokenizer", str(tmp_path)]
    run_prompts([*argv, "--placeholder_token", "dog" * 25])
    assert "longest prompt: 52 tokens (exact)" in capsys.readouterr().out
    run_prompts([*argv, "--placeholder_token", "sks" * 25])
    assert "1 prompts have over 75 tokens, the longest 77:" in capsys.readouterr().err


def test_the_estimate_counts_letters_digits_and_marks():
    assert estimated_tokens("dog") == 1
    assert estimated_tokens("watercolor") == 4
    assert estimated_tokens("8-bit") == 3
    assert estimated_tokens("") == 0
