"""What is never masked, how much is masked, and that masks are reproducible."""

import random

import pytest
import torch

from mlm_plugin.mlm.masking import IGNORE_INDEX, MASK_ID, MaskingVocabulary, mask_tokens
from mlm_plugin.mlm.teacher import context_labels

PROMPTS = [
    "a photo of sks dog at the eiffel tower in the rain",
    "sks dog wearing a red hat next to a wooden chair",
    "an oil painting of sks dog on a quiet beach, golden hour",
    "sks dog",
]


@pytest.fixture
def vocabulary(toy_text_encoder):
    return MaskingVocabulary.from_tokenizer(
        toy_text_encoder.tokenizer,
        protected=["sks", "dog"],
        low_priority=["a", "of", "photo", "the"],
    )


@pytest.fixture
def ids_BL(toy_text_encoder):
    return toy_text_encoder.tokenize_trimmed(PROMPTS)


def words_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_specials_padding_placeholder_and_class_word_are_never_masked(
    toy_text_encoder, vocabulary, ids_BL
):
    tokenizer = toy_text_encoder.tokenizer
    concept = set(words_of(tokenizer, "sks dog"))
    for seed in range(300):
        masked, labels = mask_tokens(
            ids_BL, vocabulary, mlm_probability=0.9, rng=random.Random(seed)
        )
        hidden = labels != IGNORE_INDEX
        after_eos = (ids_BL == tokenizer.eos_token_id).cumsum(dim=1) > 0
        assert not hidden[:, 0].any()
        assert not hidden[after_eos].any()
        assert not concept & set(ids_BL[hidden].tolist())
        assert torch.equal(masked[~hidden], ids_BL[~hidden])


def test_a_multi_word_class_protects_each_of_its_words(toy_text_encoder, ids_BL):
    vocabulary = MaskingVocabulary.from_tokenizer(
        toy_text_encoder.tokenizer, protected=["eiffel tower"], low_priority=[]
    )
    tower = set(words_of(toy_text_encoder.tokenizer, "eiffel tower"))
    for seed in range(50):
        labels = mask_tokens(
            ids_BL[:1], vocabulary, mlm_probability=1.0, rng=random.Random(seed)
        ).labels
        assert not tower & set(labels[labels != IGNORE_INDEX].tolist())


def test_protection_is_by_word_and_not_by_substring(toy_text_encoder):
    """The research code left "a" alone because "backpack" contains it."""
    tokenizer = toy_text_encoder.tokenizer
    vocabulary = MaskingVocabulary.from_tokenizer(
        tokenizer, protected=["backpack"], low_priority=[]
    )
    ids_BL = toy_text_encoder.tokenize_trimmed(["a backpack"])
    labels = mask_tokens(ids_BL, vocabulary, mlm_probability=1.0, rng=random.Random(0)).labels
    assert labels[labels != IGNORE_INDEX].tolist() == words_of(tokenizer, "a")


def test_every_maskable_word_is_masked_as_a_whole(toy_text_encoder, vocabulary, ids_BL):
    for seed in range(100):
        labels = mask_tokens(
            ids_BL, vocabulary, mlm_probability=0.4, rng=random.Random(seed)
        ).labels
        for ids, row in zip(ids_BL.tolist(), labels.tolist(), strict=True):
            for start, end in vocabulary.split_words(ids):
                hidden = [label != IGNORE_INDEX for label in row[start:end]]
                assert all(hidden) or not any(hidden)


def test_labels_hold_the_masked_ids_and_the_input_holds_mask_ids(vocabulary, ids_BL):
    masked, labels = mask_tokens(ids_BL, vocabulary, mlm_probability=0.3, rng=random.Random(1))
    hidden = labels != IGNORE_INDEX
    assert torch.equal(labels[hidden], ids_BL[hidden])
    assert (masked[hidden] == MASK_ID).all()
    assert (masked[~hidden] != MASK_ID).all()


def test_each_prompt_with_context_gets_a_mask_and_one_without_gets_none(vocabulary, ids_BL):
    for seed in range(100):
        labels = mask_tokens(
            ids_BL, vocabulary, mlm_probability=0.01, rng=random.Random(seed)
        ).labels
        assert (labels[:3] != IGNORE_INDEX).any(dim=1).all()
        assert not (labels[3] != IGNORE_INDEX).any()


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5])
def test_the_share_of_masked_words_is_the_rate(toy_text_encoder, rate):
    vocabulary = MaskingVocabulary.from_tokenizer(
        toy_text_encoder.tokenizer, protected=["sks", "dog"], low_priority=[]
    )
    text = "sks dog " + "hat red chair beach rain snow tower cat horse night " * 2
    ids_BL = toy_text_encoder.tokenize_trimmed([text])
    spans = vocabulary.split_words(ids_BL[0].tolist())
    maskable = len(spans) - 2
    num_hidden = 0
    for seed in range(1000):
        labels = mask_tokens(
            ids_BL, vocabulary, mlm_probability=rate, rng=random.Random(seed)
        ).labels[0]
        num_hidden += sum(bool(labels[start] != IGNORE_INDEX) for start, _ in spans)
    assert num_hidden / (1000 * maskable) == pytest.approx(rate, abs=0.02)


def test_content_words_are_chosen_far_more_often_than_function_words(
    toy_text_encoder, vocabulary, ids_BL
):
    tokenizer = toy_text_encoder.tokenizer
    counts = {"the": 0, "rain": 0}
    for seed in range(500):
        labels = mask_tokens(
            ids_BL[:1], vocabulary, mlm_probability=0.15, rng=random.Random(seed)
        ).labels
        for word in counts:
            counts[word] += bool(torch.isin(labels, torch.tensor(words_of(tokenizer, word))).any())
    assert counts["rain"] > 2 * counts["the"]  # although "the" is in the prompt twice


def test_bert_masking_hides_most_replaces_some_and_keeps_some(toy_text_encoder, vocabulary):
    ids_BL = toy_text_encoder.tokenize_trimmed(["hat red chair beach rain snow tower cat night"])
    counts = {"mask": 0, "kept": 0, "random": 0}
    for seed in range(600):
        masked, labels = mask_tokens(
            ids_BL, vocabulary, mlm_probability=1.0, rng=random.Random(seed), replace="bert"
        )
        for start, end in vocabulary.split_words(ids_BL[0].tolist()):
            assert (labels[0, start:end] == ids_BL[0, start:end]).all()
            if (masked[0, start:end] == MASK_ID).all():
                counts["mask"] += 1
            elif torch.equal(masked[0, start:end], ids_BL[0, start:end]):
                counts["kept"] += 1
            else:
                counts["random"] += 1
    total = sum(counts.values())
    assert counts["mask"] / total == pytest.approx(0.8, abs=0.03)
    assert counts["kept"] / total == pytest.approx(0.1, abs=0.03)
    assert counts["random"] / total == pytest.approx(0.1, abs=0.03)


def test_the_same_stream_gives_the_same_masks_and_the_input_is_unchanged(vocabulary, ids_BL):
    before = ids_BL.clone()
    first = mask_tokens(ids_BL, vocabulary, mlm_probability=0.3, rng=random.Random(7))
    second = mask_tokens(ids_BL, vocabulary, mlm_probability=0.3, rng=random.Random(7))
    other = mask_tokens(ids_BL, vocabulary, mlm_probability=0.3, rng=random.Random(8))
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.labels, other.labels)
    assert torch.equal(ids_BL, before)


@pytest.mark.parametrize("settings", [{"mlm_probability": 0.0}, {"mlm_probability": 1.5}])
def test_a_rate_out_of_range_is_refused(vocabulary, ids_BL, settings):
    with pytest.raises(ValueError, match="mlm_probability"):
        mask_tokens(ids_BL, vocabulary, rng=random.Random(0), **settings)


def test_tokens_added_to_the_tokenizer_are_words_of_their_own(toy_text_encoder):
    tokenizer = toy_text_encoder.tokenizer
    tokenizer.add_tokens(["<concept>"])
    vocabulary = MaskingVocabulary.from_tokenizer(
        tokenizer, protected=["<concept>"], low_priority=[]
    )
    ids_BL = toy_text_encoder.tokenize_trimmed(["a photo of <concept> dog"])
    added = tokenizer.convert_tokens_to_ids("<concept>")
    assert (added,) in vocabulary.protected
    for seed in range(20):
        labels = mask_tokens(
            ids_BL, vocabulary, mlm_probability=1.0, rng=random.Random(seed)
        ).labels
        assert added not in labels


def test_the_real_clip_vocabulary_is_split_into_words(clip_vocabulary):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_vocabulary)
    vocabulary = MaskingVocabulary.from_tokenizer(
        tokenizer, protected=["sks dog"], low_priority=["a"]
    )
    text = "a photo of sks dog at the neuschwanstein castle"
    ids = tokenizer(text).input_ids
    words = [tokenizer.decode(ids[start:end]) for start, end in vocabulary.split_words(ids)]
    assert [word.strip() for word in words] == text.split()
    assert vocabulary.protected == {(48136,), (1929,)}


@pytest.mark.parametrize("syntax", ["natural", "tags"])
def test_punctuation_is_never_a_target(toy_text_encoder, syntax):
    from mlm_plugin.mlm.prompts import PromptSet
    from mlm_plugin.prompt_sets.english import FUNCTION_WORDS, NEUTRAL_WORDS

    tokenizer = toy_text_encoder.tokenizer
    vocabulary = MaskingVocabulary.from_tokenizer(
        tokenizer, protected=["sks", "dog"], low_priority=FUNCTION_WORDS | NEUTRAL_WORDS
    )
    prompt_set, rng = PromptSet.load("living", syntax=syntax), random.Random(0)
    ids_BL = toy_text_encoder.tokenize_trimmed(
        [prompt_set.sample(rng, "sks dog") for _ in range(200)]
    )
    masked, labels = mask_tokens(ids_BL, vocabulary, mlm_probability=0.3, rng=rng, replace="bert")
    hidden = tokenizer.convert_ids_to_tokens(labels[labels != IGNORE_INDEX].tolist())
    assert len(hidden) > 200
    assert not {",</w>", "-</w>", ".</w>", "'</w>"} & set(hidden)


@pytest.mark.parametrize("text", ["a king's crown", "don't", "we'll", "they've", "you're", "i'm"])
def test_what_is_split_off_a_word_is_never_a_target(clip_vocabulary, text):
    """The token behind the apostrophe says nothing of the context."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_vocabulary)
    vocabulary = MaskingVocabulary.from_tokenizer(tokenizer, protected=[], low_priority=[])
    pieces = tokenizer.convert_ids_to_tokens(words_of(tokenizer, text))
    (split_off,) = [piece for piece in pieces if piece.startswith("'")]
    assert tokenizer.convert_tokens_to_ids(split_off) in vocabulary.punctuation


def test_a_real_word_is_not_taken_for_punctuation(clip_vocabulary):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_vocabulary)
    vocabulary = MaskingVocabulary.from_tokenizer(tokenizer, protected=[], low_priority=[])
    ids = tokenizer("zürich, 1900s - c'est l'été! 日本", add_special_tokens=False).input_ids
    words = vocabulary.split_words(ids)
    silent = [
        tokenizer.decode(ids[start:end])
        for start, end in words
        if vocabulary.punctuation.issuperset(ids[start:end])
    ]
    assert {text.strip() for text in silent} <= {",", "-", "!", "'"}


def test_words_that_the_host_puts_before_every_caption_are_not_compared(byte_tokenizer):
    prefix = "You draw a dog. <Prompt Start> "
    vocabulary = MaskingVocabulary.from_tokenizer(
        byte_tokenizer, protected=["dog"], low_priority=[], prefix=prefix
    )
    ids_BL = torch.tensor([byte_tokenizer(f"{prefix}a dog on the beach").input_ids])

    def words(spans):
        return [byte_tokenizer.decode(ids_BL[0, start:end]).strip() for start, end in spans]

    ids = ids_BL[0].tolist()
    assert words(vocabulary.split_words(ids)) == ["a", "dog", "on", "the", "beach"]
    assert words(vocabulary.words_after(ids)) == ["on", "the", "beach"]
    compared = ids_BL[context_labels(ids_BL, vocabulary) != IGNORE_INDEX]
    assert byte_tokenizer.decode(compared).split() == ["a", "on", "the", "beach"]
