"""Registers the ops with torch.compile; imported while a function that calls them is being compiled.

Importing the compiler costs more than importing torch itself (1.7 s against 1.1 s), so eager users do not.
"""

import torch

from torch_ops._arrays import IN_GRAPH

for _fn in IN_GRAPH:
    torch.compiler.allow_in_graph(_fn)
