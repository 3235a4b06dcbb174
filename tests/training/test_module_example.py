"""The example that ``help(LeapModule)`` begins with runs."""

import doctest
from pathlib import Path

import pytest
from tiny import tiny_folder

from leap_pl import LeapModule, MaskSet


class Quiet(doctest.OutputChecker):
    """Accepts what a trainer prints; an error fails nevertheless."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want


def test_the_example_of_the_module_runs(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    """On a tiny model of that name and fewer, shorter steps."""
    tiny_folder(tmp_path / "Qwen" / "Qwen2.5-0.5B")
    (tmp_path / "text.jsonl").write_bytes(text_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the cache of priors
    (example,) = doctest.DocTestFinder(recurse=False).find(LeapModule, "LeapModule")
    assert str(LeapModule.__doc__).split("\n\n")[1].lstrip().startswith(">>> ")
    for statement in example.examples:
        for number, smaller in (("batches=32", "batches=1"), ("2048", "32"), ("2000", "2")):
            statement.source = statement.source.replace(number, smaller)
    result = doctest.DocTestRunner(Quiet()).run(example)
    assert (result.attempted, result.failed) == (len(example.examples), 0)
    mask = MaskSet.load(tmp_path / "mask.safetensors")
    assert repr(mask).startswith("MaskSet(leap of Qwen/Qwen2.5-0.5B, fingerprint ")
    assert f"sparsity 0.500000, {mask.total // 2:,} of {mask.total:,} weights kept, 14 tensors)" in repr(mask)
