"""Classes of a teacher that are numbered in another order than the task's."""

from datasets import Dataset, DatasetDict

from kronecker_transformers.experiments.classification import Task


def test_what_the_teacher_numbers_in_another_order_is_turned_back():
    task = Task(DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}), ("text",), ("x", "y", "z"), None, (1, 2, 0))
    assert task.to_teacher([0, 1, 2, -1]) == [1, 2, 0, -1]  # the task's x is the teacher's 1
    assert task.from_teacher([1, 2, 0]).tolist() == [0, 1, 2]
    assert task.from_teacher([0, 0, 1]).tolist() == [2, 2, 0]
    assert task.metrics([1, 2, 0, 0], [1, 2, 0, 1]) == {"accuracy": 0.75}
