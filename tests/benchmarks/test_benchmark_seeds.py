"""The benchmark that shows that no optimisation moves perplexity."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import seeds
from experiments.quickstart import CONFIG
from leap_pl.cli.fit import make_cli

ROOT = Path(__file__).parents[2]
FOUND = {"seed-0": 20.0, "seed-1": 21.0, "seed-2": 19.5, "no-compiler": 20.1}


def test_runs_are_compared_with_the_first_seed_and_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, list[str], dict[str, str]]] = []

    def run(args: argparse.Namespace, folder: Path, options: list[str], environment: dict[str, str]) -> None:
        made.append((folder.name, options, environment))
        folder.mkdir(parents=True, exist_ok=True)
        result = {"perplexity": {"text": {"value": FOUND[folder.name]}}}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")

    monkeypatch.setattr(seeds, "_run", run)
    monkeypatch.setattr(seeds, "commit", lambda: "abc")
    words = ["--variants", "no compiler", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "F.json")]
    seeds.main(words)
    assert [name for name, _, _ in made] == list(FOUND)
    assert made[1][1:] == (["--model.seed", "1", "--data.seed", "1"], {})
    assert made[3][1:] == (["--model.seed", "0", "--data.seed", "0"], {"LEAP_PL_COMPILE": "0"})
    told = json.loads((tmp_path / "F.json").read_text(encoding="utf-8"))
    against = {row["run"]: row["against_first"] for row in told["rows"]}
    assert against == pytest.approx({"seed 0": 0, "seed 1": 0.05, "seed 2": -0.025, "no compiler": 0.005})
    assert told["spread_of_seeds"] == pytest.approx(0.075)
    assert "within 7.50%" in capsys.readouterr().out
    seeds.main(words)
    assert len(made) == len(FOUND)
    seeds.main([*words, "--seeds", "2", "1"])  # the variant is of the first one, here another
    assert [name for name, _, _ in made[len(FOUND) :]] == ["no-compiler"]
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    seeds.main([*words, "--config", str(other)])
    assert [name for name, _, _ in made[len(FOUND) + 1 :]] == list(FOUND)
    for code in ("def", "def+changes", "def+changes", None):  # other code, and code that has no name
        made.clear()
        monkeypatch.setattr(seeds, "commit", lambda code=code: code)
        seeds.main(words)
        assert [name for name, _, _ in made] == list(FOUND)


@pytest.mark.parametrize("name", seeds.VARIANTS)
def test_each_variant_differs_from_the_quickstart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def settings(options: list[str]) -> Any:
        words = ["--config", str(CONFIG), *options, "--trainer.logger", "false"]
        return make_cli(words, run=False).config.as_dict()

    options, environment = seeds.VARIANTS[name]
    assert environment or settings(options) != settings([])
    assert settings(options)["trainer"]["max_steps"] == settings([])["trainer"]["max_steps"]
