"""How well a saliency map agrees with a ground truth: IoU, accuracy and maximal F measure, as TokenCut computes them.

Shapes: T thresholds.
"""

from dataclasses import dataclass, field

import numpy as np

THRESHOLDS = 255  # T: 0, 1/255, ..., 254/255
BETA_SQUARED = 0.3  # precision counts more than recall (Achanta et al., CVPR 2009)


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of the pixels whose prediction is above 0.5 and a boolean truth, both [H, W].

    NaN if both are empty.
    """
    positive = prediction > 0.5
    union = np.count_nonzero(positive | truth)
    return np.count_nonzero(positive & truth) / union if union else float("nan")


def accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Fraction of the pixels whose prediction, thresholded at 0.5, equals a boolean truth, both [H, W]."""
    return float(np.mean((prediction > 0.5) == truth))


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


@dataclass
class SaliencyMeter:
    """Running sums of the scores of images, from which `means` computes those of the set; meters can be added."""

    images: int = 0
    accuracy: float = 0.0
    iou: float = 0.0
    iou_images: int = 0  # images for which the IoU is defined: prediction or truth is not empty
    curve: np.ndarray = field(default_factory=lambda: np.zeros(THRESHOLDS))  # F measure, T

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Add an image, prediction 0..1 and boolean truth, both [H, W]; returns the image's IoU, accuracy and F_max."""
        curve = f_curve(prediction, truth)
        scores = {"IoU": iou(prediction, truth), "accuracy": accuracy(prediction, truth), "F_max": float(curve.max())}
        self.images += 1
        self.accuracy += scores["accuracy"]
        if not np.isnan(scores["IoU"]):
            self.iou += scores["IoU"]
            self.iou_images += 1
        self.curve += curve
        return scores

    def __add__(self, other: "SaliencyMeter") -> "SaliencyMeter":
        return SaliencyMeter(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def means(self) -> dict[str, float]:
        """IoU, accuracy and F_max of the set; F_max is the maximum of the mean curve. NaN without images."""
        nan = float("nan")
        return {
            "IoU": self.iou / self.iou_images if self.iou_images else nan,
            "accuracy": self.accuracy / self.images if self.images else nan,
            "F_max": float(self.curve.max() / self.images) if self.images else nan,
        }
