"""A value of known derivative, while ``torch.compile`` traces. Imported only then.

Dynamo forgets the backward of a custom autograd function inside ``torch.func`` transforms, silently (PyTorch
2.13); put into the graph whole, the function is run by what comes after Dynamo, which doesn't.
"""

from __future__ import annotations

import torch

from ._linear_node import known_derivative

__all__ = ["known_derivative_in_graph"]

known_derivative_in_graph = torch.compiler.allow_in_graph(known_derivative)  # type: ignore[no-untyped-call]
