"""What a tokenizer puts before a text, found without knowing its family."""

from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_folder
from tokenizers import processors

from leap_pl.base_model.prefix import in_words, prefix_of, record_of
from leap_pl.base_model.tokenizer import load_tokenizer


@pytest.mark.parametrize("length", [0, 1, 2])
def test_the_prefix_is_what_stands_before_a_text(length: int, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(prefix=length)
    assert prefix_of(tokenizer) == [257, 258][:length]
    assert tokenizer("text")["input_ids"] == [*prefix_of(tokenizer), *byte_tokenizer()("text")["input_ids"]]
    assert prefix_of(load_tokenizer(str(tiny_folder(tmp_path, prefix=length)))) == prefix_of(tokenizer)
    assert record_of("first", tokenizer) == ({"bos": "first"} if length else {})


def test_what_stands_after_a_text_is_no_prefix() -> None:
    tokenizer = byte_tokenizer()
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[end]
    )
    assert tokenizer("a")["input_ids"][-1] == end[1]
    assert prefix_of(tokenizer) == []


def test_a_record_of_unknown_words_has_none() -> None:
    assert in_words({"bos": "every"}) == ["each beginning with BOS"]
    assert in_words({}) == in_words({"bos": ["every"]}) == in_words({"bos": "some"}) == []
