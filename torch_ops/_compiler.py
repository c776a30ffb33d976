"""Registers the ops with torch.compile; imported while a function that calls them is being compiled.

Importing the compiler costs more than importing torch itself (1.7 s against 1.1 s), so eager users do not. Every file
that marks a function is loaded here: one that came later would be traced into.
"""

import torch

from torch_ops._head import divergence, loss  # noqa: F401
from torch_ops._modes import has_autocast
from torch_ops._parallel import divergences, losses
from torch_ops._rules import picked  # noqa: F401
from torch_ops._rules.function import IN_GRAPH

for _fn in IN_GRAPH:
    torch.compiler.allow_in_graph(_fn)
torch.compiler.assume_constant_result(has_autocast)

# Messages between ranks, and the look at what they say, stay outside graphs.
_reason = "a loss over a group or DTensors sends messages between ranks outside the graph: leave out fullgraph=True"
divergences.divergence = torch.compiler.disable(divergences.divergence, reason=_reason)
divergences.linear_divergence = torch.compiler.disable(divergences.linear_divergence, reason=_reason)
losses.cross_entropy = torch.compiler.disable(losses.cross_entropy, reason=_reason)
losses.linear_cross_entropy = torch.compiler.disable(losses.linear_cross_entropy, reason=_reason)
