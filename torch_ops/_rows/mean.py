"""What lies about a row's mean, formed so that nothing cancels: softmax's Jacobian and its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ops._modes import is_none

# Within this of the mean, relatively, a number may be the mean: what a plain sum of 2^16 terms loses.
_ALIKE = {torch.float32: 2.0**-16, torch.float64: 2.0**-45}


def centred(g: Tensor, p: Tensor, dim: int) -> Tensor:
    """g - sum(p g) for probabilities p, which rounding may have kept from summing to 1."""
    # The same for g - c, c any number: c chooses what is rounded. One class above 1/2 gives its own g_m, so that the
    # sum has no term of it and g_m - sum(p g), nearly 0, is a sum over the others. Elsewhere c is the mean, rounded:
    # what all g have in common is gone before a sum rounds. Where g_m is that mean but for rounding, c is g_m: all g
    # alike give exactly 0. (g_m in every row would not do: for g one-hot at m, g_j - sum(p g) is -1 + (1 - p_m).)
    if is_none(p.shape[dim]):
        return g
    whole = p.sum(dim, keepdim=True)
    whole = whole.masked_fill(whole == 0, 1.0)  # a row of zeros has no distribution and no gradient
    mean = (p * g).sum(dim, keepdim=True) / whole
    top = p.argmax(dim, keepdim=True)
    own = g.gather(dim, top)
    near = (own - mean).abs() <= _ALIKE[p.dtype] * mean.abs()
    c = torch.where((p.gather(dim, top) > 0.5) | near, own, mean)
    g = g - c.masked_fill(~c.isfinite(), 0.0)
    return g - (p * g).sum(dim, keepdim=True) / whole
