"""Options that a command would not use, or would use in part: refused or told, also where they have default values."""

import json
import warnings
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from conftest import Run, failing, fit_flags
from recovered_runs import Flags
from tiny import byte_tokenizer

from leap_pl.cli.compare import compare_command
from leap_pl.cli.configs import check_configs, setting_of, with_recipes
from leap_pl.cli.evaluate import evaluate_command
from leap_pl.cli.export import export_command
from leap_pl.cli.generate import generate_command
from leap_pl.cli.main import main
from leap_pl.cli.overruled import overruled
from leap_pl.cli.prune import prune_command
from leap_pl.errors import UserError
from leap_pl.masks import MaskSet

pytestmark = pytest.mark.usefixtures("eager")


def prune_words(model: Path, text: Path, folder: Path, *more: str) -> list[str]:
    sizes = ["--seq_length=32", "--sequences=2", "--device=cpu"]
    return ["prune", f"--model={model}", f"--text={text}", f"--output_dir={folder / 'out'}", *sizes, *more]


# -- typed, or a default -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pattern=1:4", "--sparsity", "0.5"], "--pattern 1:4 has sparsity 0.75, and --sparsity 0.5 was given"),
        (["--layer_sparsity=[0.2, 0.9]", "--sparsity=0.5"], "--sparsity would not be used: --layer_sparsity sets"),
        (["--fisher_rows=0.25"], "--fisher_rows would not be used"),
    ],
)
def test_a_default_that_is_typed_counts(
    words: list[str], says: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    assert says in failing(capsys, prune_words(model_folder, text_file, tmp_path, *words))


def test_the_sparsity_of_a_pattern_may_be_typed_beside_it(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["--pattern=7:10", "--sparsity=0.3", "--method=magnitude"]
    main(prune_words(model_folder, text_file, tmp_path, *words))
    assert MaskSet.load(tmp_path / "out" / "mask.safetensors").provenance.sparsity == 0.3


def test_a_default_in_a_config_does_not(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """--print_config writes all of them."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"sparsity": 0.5, "fisher_rows": 0.25, "pattern": None}))
    words = [f"--config={tmp_path / 'c.yaml'}", "--pattern=1:4", "--method=magnitude"]
    main(prune_words(model_folder, text_file, tmp_path, *words))
    assert MaskSet.load(tmp_path / "out" / "mask.safetensors").sparsity == 0.75


def test_a_method_without_text_says_what_it_does_not_use(
    model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    main(prune_words(model_folder, text_file, tmp_path, "--method=magnitude"))
    told = "leap_pl prune: not used by magnitude, which reads no text: --text, --sequences, --seq_length\n"
    assert told in capsys.readouterr().err


def test_all_that_is_of_a_text_is_told(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    words = ("--separator=blank_line", "--bos=none", "--text_column=body", "--split=test", "--config_name=x")
    main(prune_words(model_folder, text_file, tmp_path, "--method=magnitude", *words))
    told = "--sequences, --seq_length, --separator, --bos, --text_column, --config_name, --split\n"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("option", ["split", "config_name"])
def test_parts_of_a_hub_text_are_not_of_a_local_one(
    option: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    message = failing(capsys, prune_words(model_folder, text_file, tmp_path, f"--{option}=train"))
    assert f"--{option} would not be used: they choose a part of a hub dataset" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "verb",
    [
        "evaluate --perplexity a.txt --perplexity=b.txt",
        "evaluate --tasks a --tasks b",
        "prune --ignore [a] --ignore=[b]",
        "prune --targets [a] --targets=[b]",
        "fit --model.ignore=[a] --model.ignore [b]",
        "compare --baselines=a a.json --baselines b",
    ],
)
def test_one_of_several_texts_is_not_dropped(verb: str, capsys) -> None:
    name = verb.split()[1].partition("=")[0]
    assert f"{name} is typed 2 times, and the last alone would be used" in failing(capsys, verb.split())


def test_texts_of_a_run_are_a_list(recover: Flags, text_file: Path, tmp_path: Path, capsys) -> None:
    message = failing(capsys, recover(tmp_path, f"--data.text={text_file}"))
    assert "--data.text is typed 2 times" in message
    assert "'[a.jsonl, b.jsonl]'" in message


# -- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": "piqa", "max_tokens": 9}, "--max_tokens would not be used: no text"),
        ({"tasks": "piqa", "share": "held_out"}, "--share would not be used: no text"),
        ({"tasks": "piqa", "seq_length": 64}, "--seq_length would not be used: no text"),
        ({"perplexity": "TEXT", "limit": 3}, "--limit would not be used: no task"),
        ({"perplexity": "TEXT", "seed": 3}, "--seed would not be used: no task"),
        ({"perplexity": "TEXT", "split": "train"}, "--split would not be used: no text is given by a hub id"),
        ({"perplexity": "wikitext2", "split": "train"}, "--split would not be used: no text is given by a hub id"),
        ({"perplexity": "wikitext2", "text_column": "body"}, "--text_column would not be used: wikitext2 and c4"),
        ({"perplexity": "TEXT,wikitext2", "share": "held_out"}, "wikitext2: a text from the hub has splits"),
        ({"perplexity": "some/text", "share": "held_out"}, "some/text: a text from the hub has splits"),
    ],
)
def test_what_nothing_is_measured_with(options: dict[str, Any], says: str, model_folder: Path, text_file: Path) -> None:
    given = {
        name: value.replace("TEXT", str(text_file)) if isinstance(value, str) else value
        for name, value in options.items()
    }
    with pytest.raises(UserError, match=says):
        evaluate_command(str(model_folder), **given)


def test_a_hub_text_has_configuration_and_split(monkeypatch, model_folder: Path, capsys) -> None:
    import leap_pl.data

    asked: dict[str, Any] = {}

    def held_out_tokens(text: str, tokenizer: Any, **options: Any) -> torch.Tensor:
        asked.update(options, text=text)
        return torch.arange(96)

    monkeypatch.setattr(leap_pl.data, "held_out_tokens", held_out_tokens)
    settings: dict[str, Any] = {"config_name": "en", "split": "validation", "text_column": "body", "seq_length": 32}
    figure = evaluate_command(str(model_folder), perplexity="some/text", **settings)["perplexity"]["some/text"]
    assert (asked["text"], asked["config_name"], asked["split"], asked["text_column"]) == (
        "some/text", "en", "validation", "body",
    )  # fmt: skip
    assert (figure["config_name"], figure["split"], figure["share"]) == ("en", "validation", "all")
    assert "96 tokens of its split validation)" in capsys.readouterr().out
    both = evaluate_command(str(model_folder), perplexity="wikitext2,some/text", **settings)["perplexity"]
    assert {"text_column", "split"}.isdisjoint(both["wikitext2"])  # which has its own
    assert {"text_column", "split"} <= both["some/text"].keys()


def test_a_hub_text_that_cannot_be_opened_has_a_remedy(monkeypatch, model_folder: Path) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> None:
        raise ValueError("Bad split: test")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"Bad split: test\)\. Choose with --config_name and --split\.$"):
        evaluate_command(str(model_folder), perplexity="some/text", seq_length=32)


def test_figures_are_shown_as_they_come(
    monkeypatch, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    """A disk that is full at the end, and a text that fails, take none of them away."""
    from leap_pl.evaluation import record

    def full(*_: Any) -> None:
        raise UserError("No space left")

    monkeypatch.setattr(record, "write_result", full)
    with pytest.raises(UserError, match="No space left"):
        evaluate_command(str(model_folder), perplexity=str(text_file), seq_length=32, output=str(tmp_path / "r.json"))
    shown = capsys.readouterr()
    assert f"perplexity on {text_file}: " in shown.out
    assert "written" not in shown.err
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(UserError, match="contains no text"):
        evaluate_command(str(model_folder), perplexity=f"{text_file},{tmp_path / 'empty.txt'}", seq_length=32)
    assert f"perplexity on {text_file}: " in capsys.readouterr().out


# -- names that are no paths ---------------------------------------------------------------------------------------


def test_the_name_of_a_format_or_method_may_be_the_output_folders(
    finished: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for force in (False, True):
        export_command(mask=str(finished.mask), output_dir="packed", format="packed", force=force)
        prune_command(str(model_folder), "magnitude", method="magnitude", force=force)
        compare_command(["magnitude"], output_dir="wanda", baselines="wanda", force=force)
    with pytest.raises(UserError, match="which this command reads"):
        compare_command(["magnitude"], output_dir="magnitude", force=True)


# -- recover -------------------------------------------------------------------------------------------------------


def test_settings_of_learning_in_a_config_are_told(recover: Flags, tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-5}}
    config = {"model": {"optimizer": optimizer, "warmup_steps": 7, "annealing": {"tau": {"start": 1, "end": 1}}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    says = r"not used, since the mask is not learned: model\.optimizer\.lr, model\.warmup_steps, model\.annealing\. "
    with pytest.warns(UserWarning, match=says + r"For the weights, set model\.weight_training\.lr, model\.weight_tr"):
        main(recover(tmp_path / "run", f"--config={tmp_path / 'c.yaml'}"))


@pytest.mark.filterwarnings("error:not used")
def test_usual_settings_in_a_config_are_not(recover: Flags, tmp_path: Path, capsys) -> None:
    words = recover(tmp_path / "run")
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    main(["recover", f"--config={tmp_path / 'c.yaml'}"])
    main(recover(tmp_path / "low", "--config=low_memory"))


def test_a_recipe_for_fit_is_named(recover: Flags, tmp_path: Path, capsys) -> None:
    message = failing(capsys, recover(tmp_path, "--config=short"))
    assert "Leave out --config " in message
    assert "short.yaml, which is for fit" in message
    (tmp_path / "gate.yaml").write_text("gate: BernoulliGate\n")
    message = failing(capsys, recover(tmp_path, f"--model={tmp_path / 'gate.yaml'}"))
    assert f"Leave out --model {tmp_path / 'gate.yaml'}, which is for fit" in message
    typed = failing(capsys, recover(tmp_path, "--model.gate=BernoulliGate"))
    assert "model.gate learns one. Leave --model.gate out; or" in typed


def test_a_typed_sparsity_that_is_not_the_masks(
    model_folder: Path, text_file: Path, recover: Flags, tmp_path: Path, capsys
) -> None:
    prune_command(str(model_folder), str(tmp_path / "p"), method="magnitude", sparsity=0.75)
    words = [word for word in recover(tmp_path / "run") if not word.startswith("--model.mask")]
    words.append(f"--model.mask={tmp_path / 'p'}")
    assert "model.mask sets which" in failing(capsys, [*words, "--model.sparsity=0.5"])
    main([*words, "--model.sparsity=0.75"])


def test_settings_of_another_kind_of_training_are_told(recover: Flags, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"not used, since model\.train_weights is kept: model\.weight_training\.r\."):
        main(recover(tmp_path, "--model.weight_training.r=4"))


def test_a_result_has_the_settings_of_its_texts(tmp_path: Path, model_folder: Path, text_file: Path) -> None:
    from leap_pl.evaluation.record import read_result

    output = tmp_path / "r.json"
    evaluate_command(str(model_folder), perplexity=str(text_file), seq_length=32, output=str(output))
    content = json.loads(output.read_text())
    content["perplexity"][str(text_file)] |= {"config_name": "en", "split": "train"}
    output.write_text(json.dumps(content))
    assert read_result(output)["perplexity"][str(text_file)]["split"] == "train"


def test_c4_is_read_to_the_smaller_of_two_limits(monkeypatch, tmp_path: Path) -> None:
    """256 windows, without the prefix of each, or as many tokens as are asked for."""
    import leap_pl.data
    from leap_pl.evaluation.texts import read_text

    asked: list[Any] = []
    monkeypatch.setattr(leap_pl.data, "held_out_tokens", lambda *_, most, **__: asked.append(most))
    for max_tokens in (None, 100, 10**6):
        for prefix in (0, 2):
            for bos in ("every", "first"):
                settings: Any = {"seq_length": 32, "max_tokens": max_tokens, "share": "all", "bos": bos}
                read_text("c4", byte_tokenizer(prefix=prefix), **settings)
                within = 256 * (32 - prefix * (bos == "every"))
                assert asked.pop() == min(within, max_tokens or within)


# -- from Python, where no parser has looked at them ----------------------------------------------------------------


@pytest.mark.parametrize("verb", [evaluate_command, export_command, generate_command, prune_command])
def test_a_word_that_is_none_of_the_choices_is_one_line(verb: Any, tmp_path: Path) -> None:
    """Of every option with choices; export would have written a folder without weights."""
    parameters = signature(verb).parameters
    needed = {name: str(tmp_path / "out") for name, each in parameters.items() if each.default is Parameter.empty}
    choices = {
        name: get_args(each.annotation) for name, each in parameters.items() if get_origin(each.annotation) is Literal
    }
    assert choices
    for name, words in choices.items():
        with pytest.raises(UserError, match=rf"^--{name} is ggu. Give one of {', '.join(words)}\.$"):
            verb(**needed, **{name: "ggu"})
    assert not list(tmp_path.iterdir())


def test_a_config_of_any_verb_after_an_option_that_it_sets_is_told(model_folder: Path, tmp_path: Path) -> None:
    """The verbs that learn nothing too; a mask of another sparsity than the typed one would be made without a word."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"sparsity": 0.5}))
    words = ["prune", f"--model={model_folder}", "--method=magnitude", "--sparsity=0.6"]
    with pytest.warns(UserWarning, match=r"c\.yaml comes after --sparsity 0\.6, and sets it to 0\.5\."):
        main([*words, f"--output_dir={tmp_path / 'a'}", "--config", str(tmp_path / "c.yaml")])
    assert MaskSet.load(tmp_path / "a" / "mask.safetensors").sparsity == pytest.approx(0.5, abs=1e-3)
    (tmp_path / "f.yaml").write_text(yaml.safe_dump({"sparsity": 0.6, "force": True}))
    assert overruled(["--ignore", "lm_head,norm", "--config=c"], {"c": {"ignore": ["lm_head", "norm"]}}) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main([*words, f"--output_dir={tmp_path / 'a'}", "--force", "--config", str(tmp_path / "f.yaml")])
        main(["prune", f"--config={tmp_path / 'c.yaml'}", *words[1:], f"--output_dir={tmp_path / 'b'}"])
    assert MaskSet.load(tmp_path / "b" / "mask.safetensors").sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_config_after_an_option_that_it_sets_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"sparsity": 0.5, "seed": 3}}))
    config = str(tmp_path / "c.yaml")
    typed = ["fit", "--model.sparsity=0.6", "--model.seed", "3"]
    configs = check_configs(["fit", "--config", config])
    (line,) = overruled([*typed, "--config", config], configs)
    assert line.startswith(f"--config {config} comes after --model.sparsity 0.6, and sets it to 0.5. Give --config")
    assert overruled(["fit", f"--config={config}", *typed[1:]], configs) == []
    assert overruled([*typed, f"--config={config}", "--model.sparsity=0.7"], configs) == []  # typed again
    for option, value, then in (
        ("--model.sparsity", "0.6", "0.5"),
        ("--model.optimizer.lr", "3e-4", "0.001"),  # which the recipe has among the settings of the class
        ("--model.optimizer.betas", "[0.9,0.99]", "[0.9, 0.95]"),
        ("--model.gate", "NMGate", "{'class_path': 'BernoulliGate', 'init_args': {'spread': 0.003, 'strength': 21}}"),
    ):
        words = with_recipes(["fit", option, value, "--config", "short"])
        (line,) = overruled(words, check_configs(words))
        assert line.startswith(f"--config short comes after {option} {value}, and sets it to {then}.")
    (tmp_path / "text.yaml").write_text(yaml.safe_dump({"data": {"text": "other.jsonl"}, "model": {"prior": None}}))
    words = ["fit", "--data.text=mine.jsonl", "--model.prior=x", "--config=short", f"--config={tmp_path / 'text.yaml'}"]
    words = with_recipes(words)
    first, second = overruled(words, check_configs(words))
    assert "comes after --data.text mine.jsonl, and sets it to other.jsonl." in first
    assert "text.yaml comes after --model.prior x, and sets it to null." in second
    for same in (
        ["--model.optimizer.betas=[0.9,0.95]"],
        ["--model.gate", "BernoulliGate"],
        ["--model.optimizer.lr=1e-3"],
    ):
        words = with_recipes(["fit", *same, "--config=short"])
        assert overruled(words, check_configs(words)) == []


def test_files_for_groups_of_settings_are_read_as_the_parser_reads_them(tmp_path: Path, monkeypatch) -> None:
    """Named by a config, relative to its folder, or typed; at any depth."""
    monkeypatch.chdir(tmp_path)
    for name, settings in (
        ("shared/trainer.yaml", {"max_steps": 7}),
        ("shared/annealing.yaml", {"alpha.end": 50.0}),
        ("shared/model.yaml", {"sparsity": 0.4, "annealing": "annealing.yaml"}),
        ("outer.yaml", {"trainer": "shared/trainer.yaml", "model": "shared/model.yaml", "data": "shared/none.yaml"}),
        ("later.yaml", {"trainer": {"max_steps": 8}}),
        ("circle.yaml", {f"model{number}": "circle.yaml" for number in range(50)}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(settings))

    def lines(words: str) -> list[str]:
        typed = words.split()
        return [line.partition(". Give")[0] for line in overruled(typed, check_configs(typed))]

    assert check_configs(["fit", "--config=outer.yaml"])["outer.yaml"] == {
        "trainer": {"max_steps": 7},
        "model": {"sparsity": 0.4, "annealing": {"alpha": {"end": 50.0}}},
        "data": "shared/none.yaml",  # which the parser reports
    }
    assert lines(
        "fit --trainer.max_steps 3 --model.annealing.alpha.end=60 --model.sparsity 0.4 --config outer.yaml"
    ) == [
        "--config outer.yaml comes after --trainer.max_steps 3, and sets it to 7",
        "--config outer.yaml comes after --model.annealing.alpha.end 60, and sets it to 50.0",
    ]
    assert lines("fit --trainer.max_steps 3 --trainer shared/trainer.yaml") == [
        "--trainer shared/trainer.yaml comes after --trainer.max_steps 3, and sets it to 7"
    ]
    assert lines("fit --trainer=shared/trainer.yaml --config later.yaml") == [
        "--config later.yaml comes after --trainer shared/trainer.yaml, and sets trainer.max_steps to 8"
    ]
    assert lines("fit --config later.yaml --trainer=shared/trainer.yaml --trainer.max_steps 3") == []
    assert lines("fit --model.sparsity=0.6 --config circle.yaml") == []  # the parser reports it
    words = ["fit", "--model", "shared/model.yaml"]
    assert setting_of(words, check_configs(words), "model.sparsity") == "0.4"
    words = ["fit", "--config", "later.yaml", "--config=outer.yaml", "--config", "later.yaml"]
    assert list(check_configs(words)) == ["outer.yaml", "later.yaml"]  # the last one has the last word


def test_the_command_says_so(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"sparsity": 0.5}}))
    words = fit_flags(model_folder, text_file, tmp_path, "--model.sparsity=0.6", f"--config={tmp_path / 'c.yaml'}")
    with pytest.warns(UserWarning, match=r"comes after --model\.sparsity 0\.6, and sets it to 0\.5"):
        main([*words, "--trainer.max_steps=1"])
    (tmp_path / "c.yaml").write_text("model: m.yaml\n")
    (tmp_path / "m.yaml").write_text("sparsity: 0.5\n")
    with pytest.warns(UserWarning, match=r"comes after --model\.sparsity 0\.6, and sets it to 0\.5"):
        cli = main([*words, "--trainer.max_steps=1", "--force"])
    assert cli.config.fit.model.sparsity == 0.5


# -- callbacks that the run has, and settings that exclude each other --------------------------------------------------


def test_a_callback_that_the_run_has_is_one_line(model_folder: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    twice = "--trainer.callbacks+=leap_pl.callbacks.SparsityLogger"
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, twice))
    assert "trainer.callbacks has one that the run has already (Found more than one stateful callback" in message


def test_a_progress_bar_of_lightning_takes_the_place_of_our_own(
    model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    bar = "--trainer.callbacks+=TQDMProgressBar"
    main(fit_flags(model_folder, text_file, tmp_path, bar, "--trainer.max_steps=1"))
    assert (tmp_path / "checkpoints" / "mask.safetensors").is_file()


@pytest.mark.parametrize("option", ["foreach", "differentiable"])
def test_settings_of_an_optimizer_that_exclude_each_other(
    option: str, model_folder: Path, text_file: Path, tmp_path: Path, capsys
) -> None:
    message = failing(capsys, fit_flags(model_folder, text_file, tmp_path, f"--model.optimizer.{option}=true"))
    assert "model.optimizer does not take its settings: " in message
