"""Text, windows and splits: whole words, nothing shared between the uses."""

from itertools import pairwise

import pytest

from poprisk_integrations.cli.demo.corpus import cut_windows, reference_texts, split_corpus
from poprisk_integrations.cli.demo.tokenizer import starts_word, train_tokenizer

# Token 0 goes on with a word, token i > 0 starts one; so documents can count positions.
WORDS = [False] + [True] * 999


def test_reference_texts_are_plain_lines() -> None:
    texts = reference_texts()
    assert len(texts) > 50
    assert sum(map(len, texts)) > 300_000
    assert all(text.isascii() and text == " ".join(text.split()) for text in texts)
    assert not any(set(word) <= set("*=-~^#") for text in texts for word in text.split())


def test_windows_tile_the_text() -> None:
    windows = cut_windows(list(range(1, 31)), WORDS, 4, 8)
    assert [window.prompt for window in windows][:2] == [(1, 2, 3, 4), (9, 10, 11, 12)]
    assert windows[0].continuation == tuple(range(5, 13))
    for before, after in pairwise(windows):
        assert before.continuation[-1] + 1 == after.continuation[0]


def test_windows_keep_words_whole() -> None:
    tokens = [1, 0, 2, 0, 3, 0, 0, 0, 4, 0, 5, 0, 6]
    for window in cut_windows(tokens, WORDS, 2, 5):
        assert window.prompt[0] != 0
        assert window.continuation[0] != 0
        assert len(window.prompt) >= 2
        assert 2.5 <= len(window.continuation) <= 5
    # 3 0 0 0 fits into 5 tokens, 3 0 0 0 4 would break the word 4 0.
    assert cut_windows(tokens, WORDS, 4, 5)[0].continuation == (3, 0, 0, 0)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [0, 0, 0, 0, 0, 0, 0, 0]])
def test_no_window_in_too_short_a_text(tokens: list[int]) -> None:
    assert cut_windows(tokens, WORDS, 4, 8) == []


def split(train: int = 6, heldout: int = 5, seed: int = 0):
    documents = [list(range(1, 200)), list(range(200, 400))]
    return split_corpus(
        documents,
        WORDS,
        block_tokens=40,
        prompt_tokens=4,
        continuation_tokens=8,
        train=train,
        heldout=heldout,
        seed=seed,
    )


def test_split_shares_no_token() -> None:
    parts = split()
    assert (len(parts.train), len(parts.heldout)) == (6, 5)
    tokens = [
        {token for w in windows for token in w.prompt + w.continuation}
        for windows in (parts.train, parts.heldout, parts.finetuning)
    ]
    assert all(tokens)
    assert tokens[0].isdisjoint(tokens[1])
    assert tokens[2].isdisjoint(tokens[0] | tokens[1])


def test_split_follows_the_seed() -> None:
    assert split(seed=3) == split(seed=3)
    assert split(seed=3) != split(seed=4)


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="too few windows for 500 training pairs"):
        split(train=500)


def test_tokens_survive_decoding() -> None:
    """TRL sees text: cut at words, it must give back the tokens of the window."""
    texts = reference_texts()[:8]
    tokenizer = train_tokenizer(texts, 512)
    tokens = tokenizer(texts[0])["input_ids"]
    windows = cut_windows(tokens, starts_word(tokenizer), 8, 16)
    assert len(windows) > 10
    for window in windows:
        prompt, human = (tokenizer.decode(part) for part in (window.prompt, window.continuation))
        assert tokenizer(prompt)["input_ids"] == list(window.prompt)
        both = tokenizer(prompt + human)["input_ids"]
        assert both == list(window.prompt + window.continuation)


def test_the_tokenizer_is_reproducible() -> None:
    texts = reference_texts()[:4]
    first, second = (train_tokenizer(texts, 400).get_vocab() for _ in range(2))
    assert first == second
    assert len(first) == 400
