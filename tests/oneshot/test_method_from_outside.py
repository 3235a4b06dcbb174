"""A new one-shot method is one file and one row of the table: everything else derives from that."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import fit_flags, refused
from tiny import tiny_folder

from leap_pl.cli.main import main
from leap_pl.inputs.ranges import POSITIVE
from leap_pl.masks import MaskSet
from leap_pl.oneshot.methods import METHODS, Method, Option, settings_of

NAME = "wanda_powered"
FILE = '''
from dataclasses import dataclass

from leap_pl.masks.patterns import choose
from leap_pl.oneshot.options import MethodOptions


@dataclass(frozen=True)
class PowerOptions(MethodOptions):
    power: float = 2.0


def powered_mask(weight_OI, mean_square_I, pattern, options):
    """Weigh a weight's size by a power of that of its input."""
    return choose(weight_OI.abs() * mean_square_I ** (options.power / 2), pattern, "row")
'''


@pytest.fixture(autouse=True)
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    (tmp_path / "file_of_a_method.py").write_text(FILE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from file_of_a_method import PowerOptions  # type: ignore[import-not-found]

    row = Method(
        "file_of_a_method:powered_mask",
        "wanda with another power",
        needs="mean_square",
        settings=PowerOptions,
        options={"power": Option(PowerOptions.power, POSITIVE, "Power of the size of inputs.")},
    )
    monkeypatch.setitem(METHODS, NAME, row)
    return row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "tiny")


def words_of(folder: Path, text: Path, output: Path, method: str = NAME) -> list[str]:
    words = ["prune", f"--model={folder}", f"--text={text}", f"--output_dir={output}", f"--method={method}"]
    return [*words, "--seq_length=32", "--sequences=4", "--device=cpu"]


def test_prune_makes_its_mask(folder: Path, text_file: Path, tmp_path: Path) -> None:
    for output, more in (("wanda", ["--method=wanda"]), ("1", ["--power=1"]), ("2", [])):
        main([*words_of(folder, text_file, tmp_path / output), *more])
    wanda, one, two = (MaskSet.load(tmp_path / output / "mask.safetensors") for output in ("wanda", "1", "2"))
    assert one.digest_of_bits() == wanda.digest_of_bits() != two.digest_of_bits()
    assert two.provenance.method == NAME
    assert two.provenance.config["power"] == 2.0
    assert json.loads((tmp_path / "2" / "errors.json").read_text())["layer_error"]
    assert not (tmp_path / "2" / "model").exists()


def test_the_help_has_its_name_and_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{NAME} (wanda with another power)" in text
    assert f" Power of the size of inputs. By default 2 for {NAME}." in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--power=0"], "--power is 0; give a number above 0."),
        (["--method=wanda", "--power=2"], f"--power is not for wanda but for {NAME}. Leave it out, or"),
        (["--damping=.1"], f"--damping is not for {NAME} but for sparsegpt, admm. Leave it out"),
        (["--mask_target=dense"], "there is no option --mask_target."),
    ],
)
def test_options_that_are_not_taken_are_one_line(
    words: list[str], says: str, folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused([*words_of(folder, text_file, tmp_path / "out"), *words], capsys)
    assert says in message
    assert not (tmp_path / "out").exists()


def test_a_run_starts_from_it(
    folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = [f"--model.prior.method={NAME}", "--model.prior.sequences=4", f"--model.prior.cache_dir={tmp_path / 'c'}"]
    main(fit_flags(folder, text_file, tmp_path, *prior))
    checkpoints = tmp_path / "checkpoints"
    mask = MaskSet.load(checkpoints / "prior.safetensors")
    assert mask.provenance.method == NAME
    assert [path.name.split("-")[0] for path in (tmp_path / "c").iterdir()] == [NAME]
    with Path(str(sys.modules["file_of_a_method"].__file__)).open("a", encoding="utf-8") as file:  # of the first test
        file.write("\n# Another algorithm.\n")
    main(fit_flags(folder, text_file, tmp_path / "again", *prior))
    assert len(list((tmp_path / "c").iterdir())) == 2
    monkeypatch.delitem(METHODS, NAME)
    message = refused(fit_flags(folder, text_file, tmp_path / "other", *prior), capsys)
    assert f"prior.method is '{NAME}'; give one of magnitude, wanda, sparseswaps, sparsegpt, admm, none." in message


def test_compare_measures_against_it(folder: Path, text_file: Path, tmp_path: Path) -> None:
    masks = []
    for method in ("magnitude", NAME):
        main(words_of(folder, text_file, tmp_path / method, method))
        masks.append(str(tmp_path / method))
    results = []
    for method, mask in zip(("magnitude", NAME), masks, strict=True):
        results.append(str(tmp_path / f"{method}.json"))
        words = ["evaluate", f"--model={folder}", f"--mask={mask}/mask.safetensors", f"--perplexity={text_file}"]
        main([*words, "--seq_length=32", "--max_tokens=64", "--batch_size=1", f"--output={results[-1]}"])
    told = json.loads(Path(results[0]).read_text())
    told["method"] = "leap"  # learned, and measured against the best of the baselines
    Path(results[0]).write_text(json.dumps(told))
    main(["compare", *results, f"--output_dir={tmp_path / 'out'}"])
    assert f"({NAME})" in (tmp_path / "out" / "table.md").read_text()


def test_the_example_of_the_handbook_works(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handbook = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
    section = handbook.partition("## Add a one-shot method")[2].partition("\n## ")[0]
    file, row, script = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "wanda_squared.py").write_text(file, encoding="utf-8")
    ((name, method),) = eval(f"{{{row}}}", {"Method": Method}).items()
    monkeypatch.setitem(METHODS, name, replace(method, solve=method.solve.removeprefix("leap_pl.oneshot.")))
    for made in (name, "wanda"):
        main(words_of(folder, text_file, tmp_path / made, made))
    squared, wanda = (MaskSet.load(tmp_path / made / "mask.safetensors") for made in (name, "wanda"))
    assert squared.provenance.method == name
    assert squared.sparsity == wanda.sparsity
    assert squared.digest_of_bits() != wanda.digest_of_bits()

    # Outside the package, by a script in place of leap_pl.
    (tmp_path / "mymethod.py").write_text(file.replace("wanda_squared_mask", "my_mask"), encoding="utf-8")
    (tmp_path / "mine.py").write_text(script, encoding="utf-8")
    words = [sys.executable, str(tmp_path / "mine.py"), *words_of(folder, text_file, tmp_path / "mine", "mine")]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    mine = MaskSet.load(tmp_path / "mine" / "mask.safetensors")
    assert mine.digest_of_bits() == squared.digest_of_bits()
    assert mine.provenance.method == "mine"


def test_every_row_of_the_table_holds() -> None:
    for name, row in METHODS.items():
        assert callable(row.function())
        assert row.solve_kept is None or callable(row.function(kept=True))
        made = settings_of(name, {})
        assert made == (None if row.settings is None else row.settings())  # the defaults are the same in both
        assert bool(row.options) == (row.settings is not None)
