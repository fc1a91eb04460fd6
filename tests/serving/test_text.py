"""Text leaves exactly as it would be decoded at once, in whole characters and without stop strings."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SPECIAL_TOKENS
from worker.base_model import load_tokenizer
from worker.serving.text import TextStream, decode_all, find_stop

SAMPLE = "Grüße! 你好, ça va? 👩‍👩‍👧 naïve \ufffd end ㋛ नमस्ते"


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """A tokenizer that drops the space before its first word, as SentencePiece models do."""
    words = ["<unk>", *["▁Hello", "▁world", "!", "▁the", "▁ü", "ing", "s"]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def stream(tokenizer, ids, stop=()) -> tuple[list[str], bool]:
    text = TextStream(tokenizer, stop)
    pieces = []
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            return pieces, True
    pieces.append(text.finish())
    return pieces, text.stopped


def test_pieces_of_random_ids_add_up_to_the_whole_decoding(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(60))]
        pieces, _ = stream(tokenizer, ids)
        assert "".join(pieces) == decode_all(tokenizer, ids)


def test_pieces_of_real_text_are_whole_characters(tokenizer):
    text = SAMPLE.replace("\ufffd", "")
    pieces, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 20  # it does stream


def test_a_replacement_character_that_was_meant_comes_through(tokenizer):
    assert "".join(stream(tokenizer, tokenizer.encode(SAMPLE))[0]) == SAMPLE


def test_ids_cut_inside_a_character_end_with_one_replacement_character(tokenizer):
    ids = tokenizer.encode("a👧")[:-1]
    pieces, _ = stream(tokenizer, ids)
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == decode_all(tokenizer, ids)


def test_special_tokens_are_never_shown(tokenizer):
    ids = tokenizer.encode("yes" + "".join(SPECIAL_TOKENS) + " no" + SPECIAL_TOKENS[0])
    assert "".join(stream(tokenizer, ids)[0]) == "yes no"


def test_spaces_between_words_survive_tokenizers_that_drop_leading_ones(spaced_tokenizer):
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(1, len(spaced_tokenizer)) for _ in range(rng.randrange(30))]
        assert "".join(stream(spaced_tokenizer, ids)[0]) == decode_all(spaced_tokenizer, ids)


def first_complete(text: str, stop: list[str]) -> str | None:
    """The text before the stop string that is complete first, found letter by letter."""
    for end in range(len(text) + 1):
        complete = [word for word in stop if text[:end].endswith(word)]
        if complete:
            return text[: end - max(map(len, complete))]
    return None


def test_text_ends_before_the_stop_string_that_is_complete_first(tokenizer):
    rng = random.Random(3)
    stopped_count = 0
    for _ in range(600):
        source = "".join(rng.choice("abcü👧 \n") for _ in range(rng.randrange(40)))
        ids = tokenizer.encode(source)
        stop = [
            "".join(rng.choice("abcü👧 ") for _ in range(rng.randrange(1, 5)))
            for _ in range(rng.randrange(1, 5))
        ]
        expected = first_complete(source, stop)
        pieces, stopped = stream(tokenizer, ids, stop)
        assert stopped == (expected is not None)
        assert "".join(pieces) == (source if expected is None else expected)
        stopped_count += stopped
    assert 100 < stopped_count < 500


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer):
    text = TextStream(tokenizer, ["END"])
    pieces = [text.push(token_id) for letter in "aENbEND" for token_id in tokenizer.encode(letter)]
    assert pieces == ["a", "", "", "ENb", "", "", ""]
    assert text.stopped


def test_held_back_text_comes_out_when_the_answer_ends(tokenizer):
    assert stream(tokenizer, tokenizer.encode("wait EN"), ["END"])[0][-1].endswith("EN")


def test_the_longest_stop_string_ending_at_the_same_place_wins():
    assert find_stop("xaby", ["b", "ab"]) == 1
