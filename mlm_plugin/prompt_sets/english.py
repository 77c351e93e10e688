"""Facts about English: articles, function words, subjects, DreamBench's prompts.

The data are in ``english.toml``, ``subjects.toml`` and ``dreambench.toml`` in ``tables``.
Knows no prompt sets.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError

__all__ = [
    "FUNCTION_WORDS",
    "NEUTRAL_WORDS",
    "WORDS_WITHOUT_CONTENT",
    "category_of",
    "correct_articles",
    "dreambench_prompts",
    "is_dreambench",
    "is_ordinary_word",
    "normal_form",
    "subjects",
    "tag_style",
]

_TABLES = Path(__file__).parent / "tables"
_ENGLISH = read_toml(_TABLES / "english.toml")
FUNCTION_WORDS: frozenset[str] = frozenset(_ENGLISH["function_words"])
NEUTRAL_WORDS: frozenset[str] = frozenset(_ENGLISH["neutral_words"])
WORDS_WITHOUT_CONTENT = FUNCTION_WORDS | NEUTRAL_WORDS
"""They are masked less often than others."""
_SOUND_EXCEPTIONS = {
    word: article for article, words in _ENGLISH["articles"].items() for word in words
}


def correct_articles(text: str) -> str:
    """Make every "a" or "an" fit the word that follows; before the slot it is left unchanged."""
    return re.sub(r"\ban? (?=(\w+))", _fitting_article, text)


def _fitting_article(match: re.Match) -> str:
    word = match[1]
    article = _SOUND_EXCEPTIONS.get(word) or ("an" if word[0] in "aeiou" else "a")
    return f"{article} "


def tag_style(text: str) -> str:
    """Correct the articles within tags and drop those at the start of a tag."""
    return correct_articles(re.sub(r"(^|, )(?:an?|the) ", r"\1", text))


def normal_form(text: str) -> str:
    """The content words of a prompt in alphabetical order, with the slot ``{}``.

    Function words ("a", "on", "with"), neutral words ("photo"), punctuation and case are dropped,
    so that a prompt is recognised after any prefix and in both syntaxes.
    """
    words = re.findall(r"\{\}|[\w']+", text.lower())
    return " ".join(sorted(w for w in words if w not in WORDS_WITHOUT_CONTENT))


def is_dreambench(text: str) -> bool:
    """Whether a context (with ``{}``) is one of the DreamBench evaluation prompts."""
    return normal_form(text) in _dreambench_forms()


def dreambench_prompts(kind: str) -> tuple[str, ...]:
    """The 25 DreamBench evaluation prompts for "living" or "object", ``{}`` for the concept.

    Source: google/dreambooth dataset/prompts_and_classes.txt.
    """
    prompts = _dreambench()
    if kind not in prompts:
        raise UserError(f"DreamBench prompts: {kind!r} is not one of {', '.join(prompts)}")
    return prompts[kind]


@cache
def _dreambench() -> dict[str, tuple[str, ...]]:
    return {
        kind: tuple(prompts) for kind, prompts in read_toml(_TABLES / "dreambench.toml").items()
    }


@cache
def _dreambench_forms() -> frozenset[str]:
    return frozenset(normal_form(text) for prompts in _dreambench().values() for text in prompts)


def subjects(category: str) -> tuple[str, ...]:
    """Generic subjects of a built-in category ("golden retriever"), without article.

    They replace the concept where none is learned, as in pretraining a contextualizer.
    """
    table = _subject_table()["subjects"]
    if category not in table:
        raise UserError(f"subjects: {category!r} is not one of {', '.join(table)}")
    return tuple(table[category])


def category_of(class_token: str) -> str:
    """The built-in prompt set for a class word; "object" for unknown words.

    The whole class is looked up first ("rubber duck"), then its last word ("duck toy"), each also
    without a plural "s".
    """
    categories = _category_of_word()
    words = class_token.lower().replace("_", " ").split()
    for candidate in (" ".join(words), *words[-1:]):
        for form in (candidate, candidate.removesuffix("s"), candidate.removesuffix("es")):
            if form in categories:
                return categories[form]
    return "object"


def is_ordinary_word(text: str) -> bool:
    """Whether these words mean something to everyone: a class word, a subject, a function word."""
    word = text.lower().strip()
    return word in _category_of_word() or word in WORDS_WITHOUT_CONTENT


@cache
def _subject_table() -> dict[str, dict[str, list[str]]]:
    return read_toml(_TABLES / "subjects.toml")


@cache
def _category_of_word() -> dict[str, str]:
    tables = _subject_table()
    return {
        word: category
        for table in ("subjects", "classes")  # the second takes precedence: it has the exceptions
        for category, words in tables[table].items()
        for word in words
    }
