"""The short form of the fuzzers, some hundred damaged inputs; the long one: ``python tests/fuzz_inputs.py all``."""

import pytest
from fuzz_inputs import READERS, fuzz


@pytest.mark.parametrize(("reader", "inputs"), [("gguf", 250), ("model", 120), ("text", 400)])
def test_damaged_inputs_are_taken_or_refused_in_one_line(reader: str, inputs: int) -> None:
    said: list[str] = []
    counts = fuzz(reader, inputs, seed=1, say=said.append)
    assert counts["taken"] + counts["refused"] == inputs, said
    assert min(counts["taken"], counts["refused"]) >= inputs / 20  # some damages show, some do not
    assert set(READERS) == {"gguf", "model", "text"}
