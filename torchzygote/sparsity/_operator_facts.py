"""What there is to know about an operator before it runs, from its schema.

Knows nothing of tensors, nor of what is written down.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .._torch_private import schema_of

__all__ = ["About", "about"]


class About(NamedTuple):
    """An operator, before it runs."""

    name: str
    full_name: str
    mutable: bool
    written: tuple[int | str, ...]
    parameters: tuple[tuple[str, Any], ...]
    adds_to: bool
    random: bool
    reveals_values: bool


# They change what a tensor object shows, not the memory.
_METADATA = {"squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "swapaxes_", "swapdims_", "detach_"}
# What they write doesn't depend on what was there.
_OVERWRITING = {"copy", "fill", "zero", "masked_fill", "index_fill", "_foreach_copy", "_foreach_zero"}
# Batch statistics are updated in place without the schema's saying so.
_HIDDEN_WRITES = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}
# Their results show the values of a float input, in a number or in a shape.
_REVEALING = {"nonzero", "nonzero_static", "_unique", "_unique2", "unique_dim", "unique_consecutive"}


@functools.cache
def about(func: Any) -> About:
    """The facts about an operator; its schema doesn't change."""
    schema = schema_of(func)
    namespace, _, base = schema.name.partition("::")
    mutable = schema.is_mutable
    name = base[:-1] if mutable and base.endswith("_") and not base.endswith("__") else base
    written: list[int | str] = [
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and base not in _METADATA
    ]
    written.extend(p for p in _HIDDEN_WRITES.get(base, ()) if p not in written)
    tags = func.tags
    return About(
        name=name if namespace == "aten" else f"{namespace}::{name}",
        full_name=str(func),
        mutable=bool(written),
        written=tuple(written),
        parameters=tuple(
            (argument.name, argument.default_value if argument.has_default_value() else None)
            for argument in schema.arguments
        ),
        adds_to=name not in _OVERWRITING and any(isinstance(where, int) for where in written),
        random=torch.Tag.nondeterministic_seeded in tags,
        reveals_values=torch.Tag.data_dependent_output in tags or base in _REVEALING,
    )
