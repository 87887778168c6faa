"""Operators where one of two operands is sparse, as far as PyTorch has them; everything else is dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._operators import NEGATIVE, OPERATORS, Operator
from ._warning import making_sparse

__all__ = ["beside_dense", "is_strided", "one_sparse"]

_BY_LINES = (torch.sparse_csr, torch.sparse_csc)


def is_strided(x: Tensor) -> bool:
    return x.layout is torch.strided


def beside_dense(op: Operator, xs: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """``right``, dense where PyTorch can't do ``op`` of a dense tensor and a sparse one in place."""
    return [
        y if is_strided(y) or not is_strided(x) or (op.symbol in "+-" and y.is_sparse) else y.to_dense()
        for x, y in zip(xs, right, strict=True)
    ]


def one_sparse(op: Operator, x: Tensor, y: Any) -> Tensor:
    """Sparse stays sparse where zeros stay zeros; elsewhere the result is dense."""
    result: Tensor
    scalar = not isinstance(y, Tensor) or y.dim() == 0
    if (scalar and (op.symbol == "*" or op == NEGATIVE)) or (op.symbol == "+" and y is x):
        result = op.one(x, y)
    elif not (
        op == OPERATORS["/"] if scalar else op.symbol in "+-" and x.layout is y.layout and x.shape == y.shape
    ):
        result = op.one(_dense(x), _dense(y))
    elif x.is_sparse:
        result = op.one(x, y)
    elif x.layout in _BY_LINES and x.dim() == 2:
        # PyTorch neither divides nor subtracts these, and adds them in few dtypes (2.13).
        with making_sparse(x.layout):
            try:
                result = op.one(_coo(x), _coo(y))
            except NotImplementedError:  # in half precision, as sums of COO tensors
                result = op.one(_dense(x), _dense(y))
            result = result.to_sparse(layout=x.layout)
    else:
        result = op.one(_dense(x), _dense(y))
    return result


def _dense(x: Any) -> Any:
    return x.to_dense() if isinstance(x, Tensor) and not is_strided(x) else x


def _coo(x: Any) -> Any:
    return x.to_sparse() if isinstance(x, Tensor) and not is_strided(x) else x
