"""Zero-shot tasks on local data: lm-eval's prompts, this project's names, no network."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from task_folder import SUBJECTS, rows, score, write_tasks
from tiny import byte_tokenizer, tiny_folder, tiny_model
from tokenizers import processors

from leap_pl.cli.evaluate import _of_tasks, evaluate_command
from leap_pl.errors import UserError
from leap_pl.evaluation import answers
from leap_pl.evaluation import tasks as room
from leap_pl.evaluation.harness import PrefixSharingLM
from leap_pl.evaluation.local_tasks import PAPER_TASKS, LocalTasks, _data_folder, _yaml
from leap_pl.evaluation.prefix_rows import arrange
from leap_pl.evaluation.tasks import evaluate_tasks, mean_accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_scores_are_complete_and_repeat(folder):
    scores = score(["piqa", "arc_easy", "winogrande"], folder)
    assert scores == score(["piqa", "arc_easy", "winogrande"], folder)
    for task, questions in (("piqa", 6), ("arc_easy", 3), ("winogrande", 4)):
        found = scores[task]
        assert found["samples"] == len(found["correct"]) == questions
        assert found["acc"] == pytest.approx(found["correct"].count("1") / questions)
        assert (found["split"], found["source"], found["limit"], found["num_fewshot"]) == (
            "validation",
            "local",
            None,
            0,
        )
    assert "acc_norm_stderr" in scores["piqa"]
    assert "acc_norm" not in scores["winogrande"]
    mean = mean_accuracy(scores)
    assert mean["value"] == pytest.approx(sum(found["acc"] for found in scores.values()) / 3)
    assert not mean["paper"]


@pytest.mark.parametrize(("prefix", "bos", "begun"), [(1, "every", True), (1, "first", True), (1, "none", False)])
def test_requests_begin_as_the_tokenizer_begins_a_text(folder, prefix, bos, begun, monkeypatch):
    seen = []

    def spied(answers, longest):
        seen.extend(answer.tokens for answer in answers)
        return arrange(answers, longest)

    monkeypatch.setattr(answers, "arrange", spied)
    tokenizer = byte_tokenizer(prefix=prefix)
    found = evaluate_tasks(tiny_model(), tokenizer, ["arc_easy"], tasks_folder=folder, batch_size=8, limit=1, bos=bos)
    assert found["arc_easy"]["bos"] == ("every" if begun else "none")
    assert [request[0] == 257 for request in seen] == [begun] * 2
    assert not any(257 in request[1:] for request in seen)
    plain = score(["arc_easy"], folder, limit=1)["arc_easy"]
    assert "bos" not in plain
    assert begun or plain == {key: value for key, value in found["arc_easy"].items() if key != "bos"}


def test_nothing_is_put_after_a_question_or_a_prompt(folder):
    """By a tokenizer that ends every text with EOS, which would stand between question and answer."""
    tokenizer = byte_tokenizer(prefix=1)
    around = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin 0|>", "<|end|>")]
    template = processors.TemplateProcessing(single=["<|begin 0|>", "$A", "<|end|>"], special_tokens=around)
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("a").input_ids[::2] == [257, 256]
    model, settings = tiny_model(), {"tasks_folder": folder, "batch_size": 8}
    expected = evaluate_tasks(model, byte_tokenizer(prefix=1), ["arc_easy", "piqa"], **settings)
    assert evaluate_tasks(model, tokenizer, ["arc_easy", "piqa"], **settings) == expected
    prompts = ["a prompt", "a longer prompt"]
    found, plain = (
        PrefixSharingLM([257], pretrained=model, tokenizer=one, batch_size=2).tok_batch_encode(prompts)
        for one in (tokenizer, byte_tokenizer(prefix=1))
    )
    assert [x.tolist() for x in found] == [x.tolist() for x in plain]


def numpy_state() -> tuple[object, ...]:
    state = np.random.get_state()
    return state[1].tolist(), *state[2:]


def test_the_model_and_the_random_state_are_as_they_were(folder):
    model = tiny_model().train()
    model.lm_head.eval()
    before = (random.getstate(), torch.get_rng_state(), numpy_state())
    evaluate_tasks(model, byte_tokenizer(), ["piqa"], tasks_folder=folder, batch_size=8, limit=1)
    assert model.training
    assert not model.lm_head.training
    after = (random.getstate(), torch.get_rng_state(), numpy_state())
    assert (after[0], after[2]) == (before[0], before[2])
    assert torch.equal(after[1], before[1])


def test_limit_is_marked(folder):
    found = score(["piqa"], folder, limit=2)["piqa"]
    assert (found["samples"], found["limit"]) == (2, 2)


def test_solved_examples_come_before_a_question(folder, monkeypatch):
    """One of the training split, chosen by the seed, and the result says how many."""
    told = folder / "piqa" / "train.jsonl"
    rows(told, [{"goal": f"solve {n}", "sol1": "right", "sol2": "wrong", "label": 0} for n in range(9)])
    seen = []

    def spied(answers, longest):
        seen.extend(byte_tokenizer().decode(answer.tokens) for answer in answers)
        return arrange(answers, longest)

    monkeypatch.setattr(answers, "arrange", spied)
    try:
        found = score(["piqa"], folder, num_fewshot=1, limit=3, seed=0)["piqa"]
        first = list(seen)
        seen.clear()
        others = [score(["piqa"], folder, num_fewshot=1, limit=3, seed=seed) for seed in (1, 2, 3)]
        assert others
    finally:
        told.unlink()
    assert found["num_fewshot"] == 1
    assert all("solve" in text and text.index("solve") < text.index("cut") for text in first)
    assert {text.partition("cut")[0] for text in seen} - {text.partition("cut")[0] for text in first}


def test_task_of_a_group_is_found_in_the_groups_folder(folder):
    scores = score([f"mmlu_{subject}" for subject in SUBJECTS], folder)
    for found in scores.values():
        assert (found["samples"], found["split"], found["source"]) == (3, "test", "local")


def test_a_task_of_another_benchmark_is_not_read_from_the_folder(folder):
    """Its name begins with that of a group whose data is there."""
    assert _data_folder(folder, f"mmlu_{SUBJECTS[0]}") == folder / "mmlu"
    assert _data_folder(folder, "mmlu_redux_anatomy_generative") is None


def test_the_split_is_that_which_is_scored():
    leaf = {"validation_split": "validation", "test_split": "test"}
    found = {
        "results": {"a": {"alias": "a", "acc,none": 1.0}},
        "configs": {"a": leaf},
        "n-samples": {"a": {"effective": 1}},
        "n-shot": {"a": 0},
        "versions": {"a": 1.0},
        "samples": {"a": [{"doc_id": 0, "acc": 1.0}]},
    }
    assert room._scores("a", found)["split"] == "test"


def test_group_has_the_answers_of_all_its_tasks_and_a_tag_their_mean():
    leaf = {"test_split": "test"}
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 1.0, "acc_stderr,none": 0.0},
            "b": {"alias": "b", "acc,none": 0.25, "acc_stderr,none": 0.25},
            "group": {"alias": "group", "acc,none": 0.4, "acc_stderr,none": 0.2},
        },
        "group_subtasks": {"group": ["b", "a"], "tag": ["a", "b"]},
        "configs": {"a": leaf, "b": leaf},
        "n-samples": {"a": {"effective": 1}, "b": {"effective": 4}},
        "n-shot": {"a": 0, "b": 0},
        "versions": {"a": 1.0, "b": 1.0, "group": 2},
        "samples": {"a": [{"doc_id": 0, "acc": 1.0}], "b": [{"doc_id": n, "acc": float(n == 2)} for n in (3, 2, 1, 0)]},
    }
    group = room._scores("group", found)
    assert (group["acc"], group["acc_stderr"], group["version"]) == (0.4, 0.2, 2)
    assert (group["samples"], group["correct"], group["split"]) == (5, "10010", "test")
    tag = room._scores("tag", found)
    assert tag["acc"] == pytest.approx((1 + 4 * 0.25) / 5)
    assert tag["acc_stderr"] == pytest.approx(4 * 0.25 / 5)


def test_a_tag_whose_tasks_have_other_metrics_keeps_those_of_each():
    """As glue, of which cola has a correlation alone: no figure of an evaluation is lost."""
    leaf = {"validation_split": "validation"}
    found = {
        "results": {
            "cola": {"alias": "cola", "mcc,none": 0.3, "mcc_stderr,none": 0.03},
            "sst2": {"alias": "sst2", "acc,none": 0.9, "acc_stderr,none": 0.01},
        },
        "group_subtasks": {"glue": ["cola", "sst2"]},
        "configs": {"cola": leaf, "sst2": leaf},
        "n-samples": {"cola": {"effective": 10}, "sst2": {"effective": 10}},
        "n-shot": {"cola": 0, "sst2": 0},
        "versions": {"cola": 1.0, "sst2": 1.0},
        "samples": {},
    }
    with pytest.warns(UserWarning, match="--tasks glue: its tasks have no accuracy in common"):
        glue = room._scores("glue", found)
    figures = {name: value for name, value in glue.items() if isinstance(value, float) and name != "version"}
    assert figures == {"cola_mcc": 0.3, "cola_mcc_stderr": 0.03, "sst2_acc": 0.9, "sst2_acc_stderr": 0.01}
    assert room.mean_accuracy({"glue": glue}) is None
    (line,) = _of_tasks({"tasks": {"glue": glue | {"limit": None}}, "mean": None})
    assert line == "  glue: cola_mcc 0.3, sst2_acc 0.9  (20 questions of validation)"


def test_a_tag_has_the_tasks_that_lm_eval_gives_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntag: both\ndataset_path: json\n")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert room._tagged("both", manager) == ["a", "b"]
    assert room._tagged("a", manager) == []


def test_a_group_without_a_mean_of_its_own_has_that_of_its_tasks():
    leaf = {"test_split": "test"}
    found = {
        "results": {"a": {"acc,none": 1.0}, "group": {"alias": "group", "name": "group"}},
        "group_subtasks": {"group": ["a"]},
        "configs": {"a": leaf},
        "n-samples": {"a": {"effective": 3}},
        "n-shot": {"a": 0},
        "versions": {"a": 1.0},
        "samples": {"a": [{"doc_id": n, "acc": 1.0} for n in range(3)]},
    }
    assert room._scores("group", found)["acc"] == 1.0


def test_definition_changes_nothing_but_the_data(folder):
    from lm_eval.tasks import TaskManager

    where = {
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "test_split",
        "tag",
    }
    for task in ("piqa", "arc_easy", "winogrande"):
        with LocalTasks.found_in(folder, [task]) as local:
            defined = TaskManager(include_path=str(local.folder), include_defaults=False).task_index[task]
        from leap_pl.evaluation.local_tasks import _stock_index

        stock = _stock_index(task)[task].cfg
        assert {k: v for k, v in defined.cfg.items() if k not in where} == {
            k: v for k, v in stock.items() if k not in where
        }


def test_a_folder_with_brackets_in_its_name_is_read_itself(folder, tmp_path: Path) -> None:
    """datasets takes paths for patterns: run[1] would be run1, which lies beside it."""
    here, beside = tmp_path / "run[1]", tmp_path / "run1"
    shutil.copytree(folder, here)
    shutil.copytree(folder, beside)
    file = next((beside / "piqa").iterdir())
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    expected = score(["piqa"], folder)
    assert score(["piqa"], here) == expected
    shutil.rmtree(beside)
    assert score(["piqa"], here) == expected


def test_command_reads_the_folder_and_writes_the_scores(folder, tmp_path, capsys):
    base = tiny_folder(tmp_path / "base")
    output = tmp_path / "r.json"
    evaluate_command(
        model=str(base), tasks="piqa,arc_easy", tasks_folder=str(folder), limit=3, batch_size=8, output=str(output)
    )
    result = json.loads(output.read_text())
    assert 0 <= result["tasks"]["piqa"]["acc"] <= 1
    assert result["mean"]["tasks"] == ["arc_easy", "piqa"]
    assert "a quick look: the first 3" in capsys.readouterr().out


def test_other_questions_have_another_digest(folder, tmp_path):
    """As many of them; with solved examples before them too, and whatever else the file says."""
    found = {}
    asked = {"same": {}, "noted": {"note": 2}, "other": {"goal": "saw"}, "answers": {"sol2": "a saw"}}
    for name, change in asked.items():
        questions = [
            {"goal": f"cut {n}", "sol1": "a knife", "sol2": "a spoon", "label": n % 2} | change for n in range(6)
        ]
        rows(tmp_path / name / "piqa" / "validation.jsonl", questions)
        found[name] = score(["piqa"], tmp_path / name)["piqa"]
    ours = score(["piqa"], folder)["piqa"]
    digests = {name: scores["questions_digest"] for name, scores in found.items()}
    assert digests["same"] == digests["noted"] == ours["questions_digest"]
    assert len({*digests.values()}) == 3
    assert score(["piqa"], folder, limit=5)["piqa"]["questions_digest"] != digests["same"]


@pytest.mark.parametrize("name", ["a", "\u00e9\u2028", "\U0001f4c1", "\udc80", '"\\'])
def test_a_definition_is_yaml_whatever_the_path(name):
    assert yaml.safe_load(_yaml({"path": name, name: [1, None]})) == {"path": name, name: [1, None]}


def test_a_folder_beyond_the_basic_plane(tmp_path):
    """A path whose characters JSON escapes in pairs, which YAML does not read."""
    question = {"goal": "cut", "sol1": "a knife", "sol2": "a spoon", "label": 0}
    rows(tmp_path / "\U0001f4c1" / "piqa" / "validation.jsonl", [question] * 2)
    found = score(["piqa"], tmp_path / "\U0001f4c1")["piqa"]
    assert (found["samples"], found["source"]) == (2, "local")


def test_paper_mean_needs_all_six_without_a_limit():
    whole = {task: {"acc": 0.5, "acc_stderr": 0.1, "limit": None} for task in PAPER_TASKS}
    mean = mean_accuracy(whole)
    assert mean["paper"]
    assert mean["stderr"] == pytest.approx(0.1 / 6**0.5)
    assert not mean_accuracy({**whole, "piqa": {"acc": 0.5, "limit": 10}})["paper"]
    assert mean_accuracy({"gsm8k": {"exact_match": 1.0, "limit": None}}) is None


def test_shares_of_questions_are_no_digits():
    """TruthfulQA's mc2 gives each question a share; cut to whole numbers, all models would answer alike."""
    samples = [{"doc_id": 1, "acc": 0.8}, {"doc_id": 0, "acc": 0.3}]
    assert room._correct(samples) == ""
    assert room._correct([{"doc_id": 1, "acc": 1.0}, {"doc_id": 0, "acc": False}]) == "01"


def test_solved_examples_are_never_the_questions(folder, tmp_path):
    """Without the split that they are taken from, lm-eval would take them from the questions."""
    says = r"piqa has no split train, from which the 2 solved examples .*train\.jsonl, or set --num_fewshot 0"
    with pytest.raises(UserError, match=says):
        score(["piqa"], folder, num_fewshot=2)
    with pytest.raises(UserError, match=says):
        evaluate_command("no/model", tasks="piqa", tasks_folder=str(folder), num_fewshot=2)  # before a model is loaded
    assert score(["piqa"], folder, num_fewshot=0)["piqa"]["num_fewshot"] == 0
    assert score(["mmlu_anatomy"], folder, num_fewshot=1)["mmlu_anatomy"]["num_fewshot"] == 1
