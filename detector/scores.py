"""From class logits to score logits: the numbers whose sigmoids are the scores of detections."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from detector.config import Activation


def score_logits(cls_logits: Tensor, activation: Activation = "sigmoid", quality: Tensor | None = None) -> Tensor:
    """Convert class logits to logits whose sigmoids are the scores.

    Every consumer of scores (post-processing, quality-aware losses, loss analysis, export) uses this function.

    Args:
        cls_logits: (..., K) for sigmoid; (..., K + 1) with the background last for softmax.
        activation: how probabilities are made of `cls_logits`.
        quality: (..., 1) logits of localization quality (centerness or predicted IoU). The score is then the product
            of class probability and quality (Tian et al. 2019, section 3.4).

    Returns:
        (..., K). For sigmoid without quality this is `cls_logits` itself.
    """
    if activation == "sigmoid" and quality is None:
        return cls_logits
    if activation == "softmax":
        log_p = torch.log_softmax(cls_logits.float(), dim=-1)[..., :-1]
    else:
        log_p = F.logsigmoid(cls_logits.float())
    if quality is not None:
        log_p = log_p + F.logsigmoid(quality.float())
    return log_p - torch.log((-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny))
