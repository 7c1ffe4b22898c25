"""The classifier and its accuracies: by hand."""

import pytest
import torch
import torch.nn.functional as F

from clever.evaluation.probe import LinearClassifier, accuracies


def test_classifier_starts_small():
    torch.manual_seed(0)
    classifier = LinearClassifier(500, 200)
    assert classifier.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert classifier.linear.weight.mean().abs() < 2e-4 and not classifier.linear.bias.any()


@pytest.mark.parametrize("classes", [2, 4, 5, 7])
def test_top5_only_from_five_classes_on(classes):
    """Image i has its true class at rank i, from 0, by hand-made logits."""
    classifier = LinearClassifier(classes, classes)
    classifier.load_state_dict({"linear.weight": torch.eye(classes), "linear.bias": torch.zeros(classes)})
    logits = -torch.arange(float(classes)).expand(classes, -1)  # class 0 comes first, and so on
    labels = torch.arange(classes)
    result = accuracies(classifier, logits, labels)
    assert result["accuracy"] == pytest.approx(100 / classes) and result["num_test_images"] == classes
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    if classes < 5:
        assert "top5" not in result
    else:
        assert result["top5"] == pytest.approx(500 / classes)


def test_mean_accuracy_per_class_by_hand():
    """Class 0: 3 of 4 right, class 1: 1 of 1, class 2: no image, class 3: 0 of 2."""
    classifier = LinearClassifier(4, 4)
    classifier.load_state_dict({"linear.weight": torch.eye(4), "linear.bias": torch.zeros(4)})
    predictions, labels = torch.tensor([0, 0, 0, 1, 1, 2, 0]), torch.tensor([0, 0, 0, 0, 1, 3, 3])
    result = accuracies(classifier, F.one_hot(predictions, 4).float(), labels, per_class=True)
    assert result["accuracy"] == pytest.approx(100 * 4 / 7)
    assert result["mean_class_accuracy"] == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
