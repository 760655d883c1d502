"""A report shows where two answers part, in a few words."""

from poprisk_integrations.trl.pair_texts import EXCERPT, excerpts


def test_short_texts_are_shown_whole() -> None:
    pair = {"prompt": "a\nb", "chosen": "yes\x1b[1m", "rejected": "no"}
    assert excerpts(pair) == ("a b", "yes [1m", "no")


def test_long_answers_are_shown_where_they_differ() -> None:
    start = "same words " * 30
    pair = {"prompt": "q" * 200 + " why?", "chosen": f"{start}north" + " x" * 99,
            "rejected": f"{start}south"}  # fmt: skip
    prompt, chosen, rejected = excerpts(pair)
    assert all(len(text) <= EXCERPT for text in (prompt, chosen, rejected))
    assert prompt.startswith("…")
    assert prompt.endswith("why?")  # the question is at the end
    assert "north" in chosen
    assert "south" in rejected
    assert chosen.startswith("…")
    assert chosen.endswith("…")


def test_conversations_and_answers_that_are_equal_so_far() -> None:
    user = {"role": "user", "content": "Red or blue?"}
    chosen, rejected = ([user, {"role": "assistant", "content": t}] for t in ("r" * 300, "r" * 90))
    found = excerpts({"chosen": chosen, "rejected": rejected})
    assert found[0] == "Red or blue?"
    assert all(0 < len(text) <= EXCERPT for text in found)
