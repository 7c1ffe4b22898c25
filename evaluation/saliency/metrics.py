"""How well a saliency map fits a ground truth: IoU, accuracy and maxF as TokenCut counts them.

Letters: H W image size in pixels, T thresholds.
"""

from dataclasses import dataclass, field

import numpy as np

THRESHOLDS = np.arange(255) / 255  # T: 0, 1/255, ..., 254/255
BETA_SQUARED = 0.3  # precision counts more than recall (Achanta et al., CVPR 2009)


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of a prediction's values above 0.5 and a boolean truth, both [H, W]; NaN if both are empty."""
    found = prediction > 0.5
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else float("nan")


def accuracy(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Share of the pixels on which a prediction's values above 0.5 and a boolean truth, both [H, W], agree."""
    return float(np.mean((prediction > 0.5) == truth))


def f_curve(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F measure [T] of the pixels whose prediction is above each threshold; prediction 0..1 and boolean truth, both [H, W].

    Precision is 1 where no pixel is, recall is 1 where the truth is empty, F is 0 where both are 0.
    One pass over the pixels: a histogram of how many thresholds lie below each, summed up from its end.
    """
    below = np.ceil(np.asarray(prediction, np.float64) * 255).clip(0, 255).astype(np.intp)
    found, hits = (np.bincount(values.ravel(), minlength=256)[:0:-1].cumsum()[::-1] for values in (below, below[truth]))
    positives = np.count_nonzero(truth)
    precision = np.divide(hits, found, out=np.ones(255), where=found > 0)
    recall = hits / positives if positives else np.ones(255)
    product, weighted = (1 + BETA_SQUARED) * precision * recall, BETA_SQUARED * precision + recall
    return np.divide(product, weighted, out=np.zeros(255), where=weighted > 0)


@dataclass
class Scores:
    """Sums over images, which is all that their means need; those of several processes can be added."""

    images: int = 0
    accuracy: float = 0.0
    iou: float = 0.0
    iou_images: int = 0  # in which prediction or truth has an object: only there the IoU is defined
    curve: np.ndarray = field(default_factory=lambda: np.zeros(255))  # T

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Count an image, prediction 0..1 and boolean truth, both [H, W]; returns its own IoU, accuracy and F_max."""
        curve = f_curve(prediction, truth)
        own = {"IoU": iou(prediction, truth), "accuracy": accuracy(prediction, truth), "F_max": float(curve.max())}
        self.images += 1
        self.accuracy += own["accuracy"]
        if not np.isnan(own["IoU"]):
            self.iou += own["IoU"]
            self.iou_images += 1
        self.curve += curve
        return own

    def __add__(self, other: "Scores") -> "Scores":
        return Scores(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def means(self) -> dict[str, float]:
        """IoU, accuracy and F_max of the set: the maximum of the mean curve, not the mean of the maxima. NaN without images."""
        nan = float("nan")
        return {
            "IoU": self.iou / self.iou_images if self.iou_images else nan,
            "accuracy": self.accuracy / self.images if self.images else nan,
            "F_max": float(self.curve.max() / self.images) if self.images else nan,
        }
