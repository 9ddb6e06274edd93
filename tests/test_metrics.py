import numpy as np
import pytest

from ffmerge.errors import InputError
from ffmerge.models.metrics import ACCURACY, PERPLEXITY, for_task, labels_of


def test_accuracy_counts_only_labelled_positions() -> None:
    logits = np.array([[[2.0, 1.0], [0.0, 3.0]], [[5.0, 4.0], [0.0, 1.0]]])
    labels = np.array([[0, 0], [-100, 1]])  # right, wrong, ignored, right
    assert ACCURACY.add(logits, labels) == (2.0, 3)
    assert ACCURACY.value(2.0, 3) == 2 / 3


def test_perplexity_is_the_inverse_of_the_geometric_mean_probability() -> None:
    # softmax of (0, ln 3) is (1/4, 3/4); the targets 1 and 0 follow, the last logits are unused
    row = [0.0, np.log(3)]
    total, count = PERPLEXITY.add(np.array([[row, row, [9.0, -9.0]]]), np.array([[1, 1, 0]]))
    assert count == 2
    assert PERPLEXITY.value(total, count) == pytest.approx(
        (3 / 4 * 1 / 4) ** -0.5, rel=1e-15
    )  # measured 0


def test_perplexity_ignores_padding() -> None:
    logits = np.zeros((2, 4, 7), np.float32)
    labels = np.array([[1, 2, 3, -100], [-100, -100, -100, -100]])
    logits[0, 2] = [50, 0, 0, 0, 0, 0, 0]  # would cost much if its target counted
    total, count = PERPLEXITY.add(logits, labels)
    assert count == 2
    assert PERPLEXITY.value(total, count) == pytest.approx(7, rel=1e-15)  # measured 1.3e-16


def test_perplexity_of_large_logits_is_finite_and_exact() -> None:
    logits = np.array([[[1e4, 1e4 - 1, -1e4], [0.0, 0.0, 0.0]]], np.float32)
    total, _ = PERPLEXITY.add(logits, np.array([[0, 1]]))
    assert total == pytest.approx(1 + np.log1p(np.exp(-1)), rel=1e-15)  # measured 0


def test_batches_add_up() -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((6, 5, 11)).astype(np.float32)
    labels = generator.integers(0, 11, (6, 5))
    parts = [PERPLEXITY.add(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    whole = PERPLEXITY.add(logits, labels)
    assert sum(count for _, count in parts) == whole[1] == 24
    assert sum(total for total, _ in parts) == pytest.approx(
        whole[0], rel=1e-15
    )  # measured 1.3e-16


def test_a_language_model_is_its_own_label_and_padding_does_not_count() -> None:
    batch = {"input_ids": np.array([[5, 6, 0]]), "attention_mask": np.array([[1, 1, 0]])}
    assert labels_of("text-generation", batch).tolist() == [[5, 6, -100]]
    with pytest.raises(InputError, match="no labels"):
        labels_of("text-classification", batch)


def test_padding_on_the_left_is_no_context() -> None:
    """Only a token behind a real one is foretold; labels of one's own are held to that, too."""
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    ids = np.array([[0, 0, 3, 4, 5], [3, 4, 5, 0, 0], [0, 3, 0, 4, 5]])
    found = labels_of("text-generation-with-past", {"input_ids": ids, "attention_mask": mask})
    assert found.tolist() == [
        [-100, -100, -100, 4, 5], [3, 4, 5, -100, -100], [-100, -100, -100, -100, 5],
    ]  # fmt: skip
    _, count = PERPLEXITY.add(np.zeros((3, 5, 9)), found)
    assert count == 2 + 2 + 1
    own = {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask, ids, -100)}
    assert labels_of("text-generation", own).tolist() == found.tolist()


def test_no_label_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="no label that counts"):
        ACCURACY.value(0.0, 0)


def test_tasks_have_their_metric() -> None:
    assert for_task("image-classification") is ACCURACY
    assert for_task("text-generation") is PERPLEXITY
    assert for_task("feature-extraction") is None
