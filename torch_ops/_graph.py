"""Registers the ops with torch.compile; imported while a function that calls them is being compiled.

Importing the compiler costs more than importing torch itself (1.7 s against 1.1 s), so eager users do not.
"""

import torch

from torch_ops import _parallel
from torch_ops._arrays import IN_GRAPH, has_autocast

for _fn in IN_GRAPH:
    torch.compiler.allow_in_graph(_fn)
torch.compiler.assume_constant_result(has_autocast)

# Messages between ranks, and the look at what they say, stay outside graphs.
_reason = "a loss over a group or DTensors sends messages between ranks outside the graph: leave out fullgraph=True"
_parallel.cross_entropy = torch.compiler.disable(_parallel.cross_entropy, reason=_reason)
_parallel.linear_cross_entropy = torch.compiler.disable(_parallel.linear_cross_entropy, reason=_reason)
