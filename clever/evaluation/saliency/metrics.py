"""How well a saliency map agrees with a ground truth: IoU, accuracy and maximal F measure, as TokenCut computes them.

Shapes: T thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = 255  # T: 0, 1/255, ..., 254/255
BETA_SQUARED = 0.3  # precision counts more than recall (Achanta et al., CVPR 2009)


@dataclass
class ImageScores:
    """Scores of the saliency map of an image."""

    iou: float | None  # None if prediction and truth are empty
    accuracy: float
    curve: np.ndarray  # F measure, T


def score_image(prediction: np.ndarray, truth: np.ndarray) -> ImageScores:
    """Scores of a prediction 0..1 and a boolean truth, both [H, W]. IoU and accuracy are those of the pixels above 0.5."""
    positive = prediction > 0.5
    union = np.count_nonzero(positive | truth)
    iou = np.count_nonzero(positive & truth) / union if union else None
    return ImageScores(iou, float(np.mean(positive == truth)), f_curve(prediction, truth))


def f_curve(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F measure [T] of the prediction at each threshold; prediction 0..1 and boolean truth, both [H, W].

    Precision is 1 where no pixel is above the threshold, recall is 1 where the truth is empty, F is 0 where both are 0.
    One pass over the pixels: a histogram of the number of thresholds below each pixel, accumulated from its end.
    """
    thresholds_below = np.ceil(np.asarray(prediction, np.float64) * THRESHOLDS).clip(0, THRESHOLDS).astype(np.intp)  # H, W
    positives, true_positives = (
        np.bincount(counts.ravel(), minlength=THRESHOLDS + 1)[:0:-1].cumsum()[::-1]  # T
        for counts in (thresholds_below, thresholds_below[truth])
    )
    relevant = np.count_nonzero(truth)
    precision = np.divide(true_positives, positives, out=np.ones(THRESHOLDS), where=positives > 0)
    recall = true_positives / relevant if relevant else np.ones(THRESHOLDS)
    product, weighted = (1 + BETA_SQUARED) * precision * recall, BETA_SQUARED * precision + recall
    return np.divide(product, weighted, out=np.zeros(THRESHOLDS), where=weighted > 0)


def mean_scores(images: Sequence[ImageScores]) -> dict[str, float | None]:
    """IoU, accuracy and F_max of a set of images; F_max is the maximum of the mean curve. None where no image has a score."""
    if not images:
        return dict.fromkeys(("IoU", "accuracy", "F_max"))
    ious = [image.iou for image in images if image.iou is not None]
    accuracy, curve = np.mean([image.accuracy for image in images]), np.mean([image.curve for image in images], axis=0)
    return {"IoU": float(np.mean(ious)) if ious else None, "accuracy": float(accuracy), "F_max": float(curve.max())}
