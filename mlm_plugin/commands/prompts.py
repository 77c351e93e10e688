"""`mlm-plugin prompts`: inspect a prompt set before training with it.

Prints drawn prompts, or with ``--stats`` the size of every family and its share in the draw. Texts
go to stdout, messages to stderr. Needs no model; a tokenizer is loaded only if a path is given.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from mlm_plugin.errors import UserError
from mlm_plugin.mlm.prompts import PromptSet
from mlm_plugin.prompt_sets.english import category_of
from mlm_plugin.prompt_sets.files import BUILTIN, TAG_SETS
from mlm_plugin.prompt_sets.grammar import SYNTAXES

__all__ = ["estimated_tokens", "run_prompts"]

MAX_TOKENS = 75  # CLIP's window of 77 without BOS and EOS


def run_prompts(argv: list[str]) -> int:
    """Run the subcommand and return its exit code.

    Raises:
        UserError: a prompt set or tokenizer that cannot be used.
    """
    args = _parser().parse_args(argv)
    if args.num < 1:
        raise UserError(f"-n: {args.num} prompts cannot be printed; give at least 1")
    name = category_of(args.class_token) if args.prompt_set == "auto" else args.prompt_set
    prompt_set = PromptSet.load(name, syntax=args.syntax)
    count_tokens = _tokenizer_counts(args.tokenizer) if args.tokenizer else estimated_tokens
    concept = f"{args.placeholder_token} {args.class_token}".strip()
    if args.stats:
        _print_stats(prompt_set)
        prompts: Iterable[str] = (context.fill(concept) for context in prompt_set.all())
    else:
        rng = random.Random(args.seed)
        prompts = [prompt_set.sample(rng, concept) for _ in range(args.num)]
        print("\n".join(prompts))
    longest = _report_lengths(prompts, cache(count_tokens), exact=args.tokenizer is not None)
    if args.stats:
        print(f"longest prompt: {longest} tokens ({'exact' if args.tokenizer else 'estimated'})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlm-plugin prompts", description="Print prompts of a prompt set, or its statistics."
    )
    parser.add_argument(
        "--prompt_set",
        default="auto",
        help=f"{', '.join((*BUILTIN, *TAG_SETS))}, a .toml or .txt file; auto (default): by "
        "--class_token",
    )
    parser.add_argument("--placeholder_token", default="sks", help="default: sks")
    parser.add_argument(
        "--class_token", default="", help="class word that follows the placeholder, for example dog"
    )
    parser.add_argument("--syntax", choices=SYNTAXES, default="natural", help="default: natural")
    parser.add_argument("-n", "--num", type=int, default=20, help="prompts to print; default: 20")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--stats", action="store_true", help="print the size of every family; check all lengths"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="folder of a CLIP tokenizer, for exact lengths; else a cautious estimate",
    )
    return parser


def _print_stats(prompt_set: PromptSet) -> None:
    counts, shares = prompt_set.counts(), prompt_set.shares()
    width = max(map(len, (*counts, "family")))
    print(f"{'family':<{width}}  {'prompts':>9}  {'drawn':>6}")
    for name, count in counts.items():
        print(f"{name:<{width}}  {count:>9,}  {shares[name]:>6.1%}")
    print(f"{'total':<{width}}  {sum(counts.values()):>9,}")


def estimated_tokens(word: str) -> int:
    """Tokens of a word without a tokenizer: one per three letters, digit or other character.

    Above the true number for nearly all English words, so prompts that pass do fit.
    """
    letters = re.findall(r"[a-z]+", word.lower())
    others = re.sub(r"[a-z\s]", "", word.lower()).encode()
    return sum(math.ceil(len(part) / 3) for part in letters) + len(others)


def _tokenizer_counts(path: str) -> Callable[[str], int]:
    # checked here, as transformers 5 makes an empty tokenizer from a folder without a vocabulary
    if not any((Path(path) / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise UserError(f"--tokenizer: {path!r} has no vocab.json; give the folder of a tokenizer")
    from transformers import CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(path, local_files_only=True)
    return lambda word: len(tokenizer(word, add_special_tokens=False)["input_ids"])


def _report_lengths(
    prompts: Iterable[str], count_tokens: Callable[[str], int], *, exact: bool
) -> int:
    """Print which words and prompts do not fit; return the length of the longest prompt.

    CLIP's merges never cross a space, so the length of a prompt is the sum over its words.
    """
    longest = 0
    long_words: dict[str, int] = {}
    long_prompts: list[tuple[int, str]] = []
    for prompt in prompts:
        lengths = {word: count_tokens(word) for word in prompt.split()}
        long_words |= {word: length for word, length in lengths.items() if length > MAX_TOKENS}
        length = sum(lengths[word] for word in prompt.split())
        longest = max(longest, length)
        if length > MAX_TOKENS:
            long_prompts.append((length, prompt))
    about = "" if exact else "about "
    hint = "" if exact else "; give --tokenizer PATH to be exact"
    for word, length in long_words.items():
        print(f"too long: the word {word!r} has {about}{length} tokens{hint}", file=sys.stderr)
    if long_prompts:
        length, prompt = max(long_prompts)
        print(
            f"too long: {len(long_prompts)} prompts have over {MAX_TOKENS} tokens, the longest "
            f"{about}{length}: {prompt!r}{hint}",
            file=sys.stderr,
        )
    return longest
