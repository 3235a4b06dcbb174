"""Questions of a few tasks in a local folder, and a tiny model that answers them."""

import json

from tiny import byte_tokenizer, tiny_model

from leap_pl.evaluation.tasks import evaluate_tasks

SUBJECTS = ("anatomy", "virology")


def rows(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_tasks(folder):
    """Write questions of PIQA, ARC-Easy, WinoGrande and two subjects of MMLU, and return the folder."""
    rows(
        folder / "piqa" / "validation.jsonl",
        [{"goal": f"cut {n}", "sol1": "a knife", "sol2": "a spoon", "label": n % 2} for n in range(6)],
    )
    question = {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    rows(folder / "arc_easy" / "validation.jsonl", [question] * 3)
    winogrande = {"sentence": "Ann beat Bo, so _ won.", "option1": "Ann", "option2": "Bo", "answer": "1"}
    rows(folder / "winogrande" / "validation.jsonl", [winogrande] * 4)
    for subject in SUBJECTS:
        question = {"question": "Where?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": 2}
        for split in ("dev", "test"):
            rows(folder / "mmlu" / subject / f"{split}.jsonl", [question] * 3)
    return folder


def score(tasks, folder, **options):
    return evaluate_tasks(tiny_model(), byte_tokenizer(), tasks, tasks_folder=folder, batch_size=8, **options)
