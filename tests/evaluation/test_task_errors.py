"""Tasks that cannot be found, read or scored: one line each."""

import json
import os
import shutil
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.api.instance import Instance
from task_folder import SUBJECTS, rows, score, write_tasks
from tiny import byte_tokenizer, tiny_folder, tiny_model

from leap_pl.cli.evaluate import _of_tasks, _tasks_folder, evaluate_command
from leap_pl.comparison.entries import read_entries
from leap_pl.errors import UserError
from leap_pl.evaluation import tasks as room
from leap_pl.evaluation.harness import PrefixSharingLM
from leap_pl.evaluation.local_tasks import PAPER_TASKS, LocalTasks, expected_place, names_below
from leap_pl.evaluation.record import read_result
from leap_pl.evaluation.task_errors import answers_fitting, data_reached, questions_fitting
from leap_pl.evaluation.tasks import evaluate_tasks
from leap_pl.inputs import hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize(
    ("question", "says"),
    [
        (
            {"goal": "cut <|beyond|>"},
            "the text contains token 300, which was added to the tokenizer, and the model has",
        ),
        ({"sol1": "a <|beyond|>"}, "the text contains token 300"),
    ],
)
def test_a_token_that_the_model_has_no_embedding_for(question, says, tmp_path):
    rows(tmp_path / "piqa" / "validation.jsonl", [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0} | question])
    tokenizer, vocabulary = byte_tokenizer(), tiny_model().config.vocab_size
    tokenizer.add_tokens([f"<|{n}|>" for n in range(len(tokenizer), 300)] + ["<|beyond|>"])
    assert vocabulary <= 300
    with pytest.raises(UserError, match=says):
        evaluate_tasks(tiny_model(), tokenizer, ["piqa"], tasks_folder=tmp_path)


def test_requests_without_tokens_are_refused(folder):
    from leap_pl.evaluation.harness import PrefixSharingLM

    lm = PrefixSharingLM(pretrained=tiny_model(), tokenizer=byte_tokenizer(), batch_size=2)
    for request, says in (
        ((("q", ""), [1], []), r"an? answer of --tasks has no tokens: .*'q', ''"),
        (((" ", "a"), [], [1]), "a question of --tasks has no tokens"),
    ):
        with pytest.raises(UserError, match=says):
            lm._loglikelihood_tokens([(("a", "b"), [1], [2]), request])


def test_local_folder_without_data_is_told(tmp_path):
    (tmp_path / "piqa").mkdir()
    with pytest.raises(UserError, match="holds no split"):
        score(["piqa"], tmp_path)
    rows(tmp_path / "piqa" / "train.jsonl", [{"goal": "x"}])
    with pytest.raises(UserError, match="scored on another split"):
        score(["piqa"], tmp_path)


def test_unknown_task_is_told_with_near_names():
    said = room._unknown(["piqaa"], ["piqa", "arc_easy"])
    assert "no task piqaa" in said
    assert "Similar names: piqa." in said


def test_tasks_are_looked_for_before_a_model_is(folder, tmp_path):
    room.check_tasks(["piqa", "mmlu_anatomy", "hellaswag", "wikitext"], folder)
    for task, says in (("piqaa", "no task piqaa"), ("boolq", "holds no split")):
        (tmp_path / "boolq").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=says):
            evaluate_command(model="./gone", tasks=f"arc_easy,{task}", tasks_folder=str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_longer_than_the_model_reaches_is_one_line(family, folder, tmp_path):
    positions = {"gpt2": "n_positions"}.get(family, "max_position_embeddings")
    base = tiny_folder(tmp_path / "base", family, **{positions: 4})
    with pytest.raises(UserError, match="has 4 positions, and a question of --tasks has an answer with more") as caught:
        evaluate_command(model=str(base), tasks="piqa", tasks_folder=str(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(AssertionError, match="another"), answers_fitting(4):
        raise AssertionError("another")


def test_an_answer_to_generate_that_is_longer_than_the_model_reaches_is_one_line():
    lm = PrefixSharingLM(pretrained=tiny_model(), tokenizer=byte_tokenizer(), batch_size=1)
    settings = {"until": ["\n"], "max_gen_toks": lm.max_length}
    asked = Instance("generate_until", {}, ("a question", settings), 0)
    with pytest.raises(UserError, match="asks for an answer of as many tokens or more"), answers_fitting(lm.max_length):
        lm.generate_until([asked], disable_tqdm=True)


def test_more_solved_examples_than_a_task_has_are_one_line(folder, tmp_path):
    """Not said to be damaged questions; a task that draws its examples, and one that takes the first."""
    shutil.copytree(folder, tmp_path / "tasks")
    rows(tmp_path / "tasks" / "piqa" / "train.jsonl", [{"goal": "cut", "sol1": "a", "sol2": "b", "label": 1}] * 3)
    for task, most in (("piqa", 2), ("mmlu_anatomy", 3)):  # the first draws one more, and leaves out the question
        assert score([task], tmp_path / "tasks", num_fewshot=most)[task]["num_fewshot"] == most
        with pytest.raises(UserError, match=rf"--num_fewshot 4: {task} has fewer solved examples .* a smaller number"):
            score([task], tmp_path / "tasks", num_fewshot=4)


def test_figures_are_kept_where_tasks_fail_later(folder, tmp_path, capsys):
    base, output = tiny_folder(tmp_path / "base"), tmp_path / "r.json"
    text = tmp_path / "text.txt"
    text.write_text("a text " * 40)
    settings = {"model": str(base), "perplexity": str(text), "seq_length": 32, "output": str(output)}
    rows(tmp_path / "tasks" / "piqa" / "validation.jsonl", [{"strange": 1}])
    output.touch()
    for _ in range(2):  # the second replaces what the first has left
        with pytest.raises(UserError, match="the questions of piqa"):
            evaluate_command(**settings, tasks="piqa", tasks_folder=str(tmp_path / "tasks"))
        assert f"written: {output}, with the figures above alone" in capsys.readouterr().err
        result = read_result(output)
        assert (list(result["perplexity"]), result["tasks"], result["unfinished"]) == ([str(text)], {}, True)
    with pytest.warns(UserWarning, match="lacks figures: its evaluation failed after those that it has"):
        read_entries([str(output)])
    whole = evaluate_command(**settings, tasks="piqa", tasks_folder=str(folder))
    assert result["perplexity"] == whole["perplexity"]
    with pytest.raises(UserError, match="the questions of piqa"):
        evaluate_command(**settings, tasks="piqa", tasks_folder=str(tmp_path / "tasks"))
    assert f"not written: {output} exists, and is not of an evaluation that failed" in capsys.readouterr().err
    assert read_result(output)["tasks"] == whole["tasks"]
    assert "unfinished" not in read_result(output)


def test_questions_that_were_replaced_are_read_again(folder, tmp_path):
    """datasets keeps what it has read by name and time of change, whatever the file holds."""
    shutil.copytree(folder / "piqa", tmp_path / "piqa")
    place = tmp_path / "piqa" / "validation.jsonl"
    before = place.stat()
    first = score(["piqa"], tmp_path)["piqa"]["questions_digest"]
    place.write_text(place.read_text().replace("cut", "saw"))
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert score(["piqa"], tmp_path)["piqa"]["questions_digest"] != first


@pytest.mark.parametrize(
    "task", [*(task for task in PAPER_TASKS if task != "mmlu"), "mmlu_anatomy", "gpqa_main_zeroshot"]
)
def test_the_place_that_is_advised_for_questions_is_taken(task, tmp_path):
    rows(tmp_path / expected_place(task), [{"question": "?"}])
    with LocalTasks.found_in(tmp_path, [task], 0) as local:
        assert local.names == {task}


def test_the_place_that_is_advised_for_a_group(folder):
    """Of its first task: each has a folder of its own."""
    place = expected_place("mmlu")
    assert (place.parts[0], place.name, len(place.parts)) == ("mmlu", "test.jsonl", 3)
    assert (folder / "mmlu" / SUBJECTS[0] / place.name).is_file()


def test_a_folder_of_questions_that_is_there_is_used_unless_the_hub_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _tasks_folder(None) is None
    (tmp_path / "assets" / "tasks").mkdir(parents=True)
    assert (_tasks_folder(None), _tasks_folder("hub")) == ("assets/tasks", None)
    assert "(--tasks_folder names another folder, or hub)" in capsys.readouterr().err


def test_hub_out_of_reach_is_one_line():
    def attempt(error, remote, folder=None):
        with data_reached(remote, folder):
            raise error

    with pytest.raises(UserError, match=r"Lay it out as FOLDER/piqa/validation.jsonl .* make assets-eval"):
        attempt(ConnectionError("no route\nto host"), ["piqa"])
    another = type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        attempt(another("no route"), ["boolq"])
    with pytest.raises(UserError, match=r"mine has no folder of that name. Lay it out as mine/boolq/validation.jsonl"):
        attempt(ConnectionError("no route"), ["boolq"], "mine")
    with pytest.raises(UserError, match=r"Lay it out as FOLDER/gpqa_main_zeroshot/train.jsonl and name .*_folder\.$"):
        attempt(ConnectionError("no route"), ["gpqa_main_zeroshot"])
    says = r"the data of mmlu could .*FOLDER/mmlu/\w+/test.jsonl .* make assets-eval"
    with pytest.raises(UserError, match=says), data_reached(["piqa", "mmlu"], None):
        busy_with("mmlu_anatomy", ConnectionError("no route"))
    assert "mmlu_stem_generative" in names_below("mmlu_generative")  # within a group that its own definition has
    with pytest.raises(UserError, match="names a task twice"):
        attempt(ValueError("Duplicate task 'a': found in both 'b' and 'c'"), [])
    with pytest.raises(ZeroDivisionError):
        attempt(ZeroDivisionError(), ["boolq"])
    with pytest.raises(FileNotFoundError):
        attempt(FileNotFoundError("a local file"), [])


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """The client would ask for more than a minute; what is in the caches is still read."""
    from huggingface_hub import constants

    def unreachable(name, kind):
        raise ConnectionError(name, kind)

    for setting in (datasets.config, constants):
        monkeypatch.setattr(setting, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "check_reachable", unreachable)
    with pytest.raises(ConnectionError, match="org/data") as caught, hub.offline_if_unreachable("org/data", "dataset"):
        datasets.load_dataset("org/none")
    assert "Offline" in str(caught.value.__cause__)
    with pytest.raises(ZeroDivisionError), hub.offline_if_unreachable("org/data", "dataset"):
        raise ZeroDivisionError
    assert not datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "check_reachable", lambda name, kind: None)
    with hub.offline_if_unreachable("org/data", "dataset"):
        assert not constants.HF_HUB_OFFLINE


def test_missing_tasks_folder_is_told(tmp_path):
    base = tiny_folder(tmp_path / "base")
    with pytest.raises(UserError, match="make assets-eval"):
        evaluate_command(model=str(base), tasks="piqa", tasks_folder=str(tmp_path / "gone"))


def test_splits_of_a_task_are_in_one_format(folder, tmp_path):
    questions = shutil.copytree(folder / "piqa", tmp_path / "piqa")
    lines = (questions / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), questions / "validation.parquet")
    with pytest.raises(UserError, match=r"piqa holds validation\.jsonl, validation\.parquet\. Keep one file for each"):
        score(["piqa"], tmp_path, num_fewshot=0)
    (questions / "validation.jsonl").rename(questions / "train.jsonl")
    with pytest.raises(UserError, match=r"piqa holds train\.jsonl, validation\.parquet\. Keep one .*in one format"):
        score(["piqa"], tmp_path, num_fewshot=2)
    (questions / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"Add a file such as train\.parquet"):
        score(["piqa"], tmp_path, num_fewshot=2)
    assert score(["piqa"], tmp_path, num_fewshot=0)["piqa"] == score(["piqa"], folder, num_fewshot=0)["piqa"]


def test_what_fails_beside_local_questions_is_not_their_fault(folder, monkeypatch):
    real = datasets.load_dataset

    def load(path, *args, **options):
        if path not in ("json", "parquet"):
            raise ConnectionError("no route")
        return real(path, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "check_reachable", lambda name, kind: None)
    with pytest.raises(UserError, match="the data of boolq could not be fetched from the hub"):
        score(["piqa", "boolq"], folder)


def test_a_data_set_that_is_a_script_is_one_line(folder, monkeypatch):
    """datasets raises a plain RuntimeError for those of about thirty tasks."""
    real = datasets.load.dataset_module_factory

    def factory(path, *args, **options):
        if path in ("json", "parquet"):
            return real(path, *args, **options)
        raise RuntimeError(f"Dataset scripts are no longer supported, but found {path}.py")

    monkeypatch.setattr(datasets.load, "dataset_module_factory", factory)
    monkeypatch.setattr(hub, "check_reachable", lambda name, kind: None)
    with pytest.raises(UserError, match=r"the data of boolq could not be .* \(Dataset scripts are no longer supported"):
        score(["piqa", "boolq"], folder)


def test_a_damaged_task_of_a_local_group_is_named(folder, tmp_path):
    shutil.copytree(folder / "mmlu", tmp_path / "tasks" / "mmlu")
    rows(tmp_path / "tasks" / "mmlu" / "anatomy" / "test.jsonl", [{"strange": 1}] * 3)
    with pytest.raises(UserError, match=r"the questions of mmlu_anatomy in .* are damaged"):
        score(["mmlu_anatomy"], tmp_path / "tasks")
    of_group = LocalTasks(tmp_path, frozenset({"mmlu"}), frozenset({"mmlu", "mmlu_anatomy"}))
    with pytest.raises(UserError, match="the questions of mmlu in"), questions_fitting(of_group, "tasks"):
        busy_with("mmlu_anatomy")
    with pytest.raises(KeyError), questions_fitting(of_group, "tasks"):
        busy_with("boolq")


def busy_with(task, error=None):
    class Asking:
        config = SimpleNamespace(task=task)

        def read(self):
            raise error or KeyError("choices")

    Asking().read()


def test_tasks_that_cannot_run_here_are_one_line(folder):
    def attempt(error):
        with (
            LocalTasks.found_in(folder, ["piqa"]) as local,
            data_reached(["some"], None),
            questions_fitting(local, folder),
        ):
            raise error

    with pytest.raises(UserError, match=r"needs a package: No module named 'langdetect'\. Install it"):
        attempt(ModuleNotFoundError("No module named 'langdetect'"))
    with pytest.raises(UserError, match="runs code that the model has written"):
        attempt(ValueError("Attempted to run task: humaneval which is marked as unsafe. Set confirm_run_unsafe_code"))


def test_an_error_that_is_not_known_is_not_shown_as_zero():
    tasks = {"a": {"acc": 0.5, "acc_norm": 0.25, "acc_norm_stderr": 0.1, "samples": 1, "split": "test", "limit": 1}}
    (line,) = _of_tasks({"tasks": tasks, "mean": None})
    assert line == "  a: acc 50.00%, acc_norm 25.00% ± 10.00%  (1 questions of test, a quick look: the first 1)"


def test_a_device_that_is_counted_and_cannot_be_used(monkeypatch):
    """As NVML counts one of which the driver is too old for this torch."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = torch.random.get_rng_state()
    with room._keeping_random_state():
        torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), before)
