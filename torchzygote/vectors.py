"""Between parameters or gradients and one flat vector, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._create_graph import keeps_graph
from ._metadata import Metadata, metadata_of
from ._multi_tensor import copy_all, flatten, parts_of, recorded
from ._overlap import AddressRanges, all_apart, can_be_written, is_unresolved, known_apart, writable
from .grads import Grads
from .params import Params

__all__ = ["copy_"]

# Up to so many bytes are put together first and then written, in half of the time of many small copies.
_SMALL = 2**24


def copy_(dst: Any, src: Any) -> Any:
    """``dst``, filled from ``src``: one is a :class:`Params` or :class:`Grads`, the other a flat vector.

    Parameters
    ----------
    dst, src : Params or Grads, and Tensor or numpy.ndarray
        One of each, in either order. The vector is one-dimensional and holds the elements in the order of the
        ``Params``, each tensor's in row-major order.

    Returns
    -------
    Params, Grads, Tensor or numpy.ndarray
        ``dst``, written into: parameters keep their identity and their flags.

    Raises
    ------
    ValueError
        The vector's length doesn't fit, or it is not one-dimensional; ``dst`` can't be written into
        (expanded, sparse, read-only, made in inference mode), or a tensor is on the meta device. Nothing is
        written then.
    TypeError
        Anything else than one of each kind, or a dtype that can't hold the elements.
    RuntimeError
        Into :class:`Params`: ``src`` is part of what is being differentiated, which writing would cut off.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import Params, copy_
    >>> w, b = torch.zeros(2), torch.zeros(())
    >>> ps = copy_(Params([w, b]), torch.tensor([1., 2., 3.]))
    >>> w, b
    (tensor([1., 2.]), tensor(3.))
    >>> copy_(torch.zeros(3), ps)
    tensor([1., 2., 3.])

    References
    ----------
    ``copy!`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    if isinstance(dst, (Params, Grads)) and isinstance(src, (Tensor, np.ndarray)):
        xs = _members(dst)
        known = metadata_of(xs)
        _from_vector(dst, xs, known, _vector("src", src, dst, xs, known))
    elif isinstance(src, (Params, Grads)) and isinstance(dst, (Tensor, np.ndarray)):
        xs = _members(src)
        known = metadata_of(xs)
        vector = _vector("dst", dst, src, xs, known)
        _to_vector(vector, xs, known)
        if isinstance(dst, np.ndarray) and not _shareable(dst):
            dst[...] = vector.numpy()
    else:
        raise TypeError(
            "copy_: expected a Params or Grads and a flat vector, in either order, got dst a "
            f"{type(dst).__name__} and src a {type(src).__name__}"
        )
    return dst


def _members(holder: Params | Grads) -> list[Tensor]:
    return list(holder) if isinstance(holder, Params) else holder._left("copy_")


def _vector(
    name: str,
    vector: Tensor | np.ndarray[Any, Any],
    holder: Params | Grads,
    members: list[Tensor],
    known: Metadata | None,
) -> Tensor:
    """``vector`` as a tensor, if its length fits; ``known``: the metadata of the members."""
    if isinstance(vector, np.ndarray):
        if name == "dst" and not vector.flags.writeable:
            raise ValueError(
                f"copy_: expected {name} to be a vector that can be written to, got a read-only array"
            )
        if name == "src" or not _shareable(vector):
            vector = np.array(vector, dtype=vector.dtype.newbyteorder("="), order="C")
        try:
            vector = torch.from_numpy(vector)
        except TypeError:
            raise TypeError(
                f"copy_: expected {name} to be a vector of a dtype that PyTorch has, got an array of dtype "
                f"{vector.dtype}; nothing was written"
            ) from None
    expected = sum(known.numels if known is not None else (x.numel() for x in members))
    if vector.dim() != 1 or vector.numel() != expected:
        raise ValueError(
            f"copy_: expected {name} to be a vector of {expected} elements, as the {type(holder).__name__} "
            f"has, got shape {tuple(vector.shape)}; nothing was written"
        )
    has_meta = any(x.is_meta for x in members) if known is None else known.has_meta
    if vector.is_meta or (has_meta and name == "dst"):
        _check_meta(name, vector, members)
    return vector


def _check_meta(name: str, vector: Tensor, members: list[Tensor]) -> None:
    """Refuse to read from the meta device, which has no elements, and a vector there to write into."""
    if vector.is_meta and not (name == "src" and all(x.is_meta for x in members)):
        found, way = name, "make it on another device"
    elif name == "dst":
        found, way = "a tensor of src", "give it elements, as by to_empty()"
    else:
        return
    raise ValueError(
        f"copy_: expected tensors with elements, got {found} on the meta device, which has none; {way}; "
        "nothing was written"
    )


def _shareable(vector: np.ndarray[Any, Any]) -> bool:
    """Whether a tensor can have the memory of ``vector``."""
    return vector.dtype.isnative and not any(s < 0 or s % vector.itemsize for s in vector.strides)


def _check_dtypes(dst: list[torch.dtype], src: list[torch.dtype]) -> None:
    for d in set(dst):
        for s in set(src):
            if not torch.can_cast(s, d):
                raise TypeError(
                    f"copy_: expected a dtype that holds what {s} does, got {d}; nothing was written"
                )


def _from_vector(dst: Params | Grads, xs: list[Tensor], known: Metadata | None, vector: Tensor) -> None:
    kinds = {x.is_complex() for x in xs} if vector.is_complex() else set()
    if len(kinds) > 1:
        _check_dtypes([x.dtype for x in xs if x.is_complex()], [vector.dtype])
        _check_dtypes([x.dtype for x in xs if not x.is_complex()], [vector.dtype.to_real()])
    else:
        _check_dtypes([x.dtype for x in xs], [vector.dtype])
    if vector.layout is not torch.strided:
        vector = vector.to_dense()
    free = not xs or (known is not None and _is_apart(xs, known, vector))
    if isinstance(dst, Params):
        _check_parameters(xs, vector, free)
    if not free and AddressRanges(xs).meets(vector):
        vector = vector.clone()
    parts = parts_of(vector, xs, known)
    if len(kinds) > 1:
        parts = _real_where_they_are(xs, parts)
    if isinstance(dst, Grads):
        inside: Sequence[int] = [] if recorded([vector, *xs]) else range(len(xs)) if free else writable(xs)[0]
        for i in set(range(len(xs))).difference(inside):
            xs[i] = parts[i].to(dtype=xs[i].dtype, device=xs[i].device, copy=True)
        if len(inside) == len(xs):
            copy_all(xs, parts, known)
        else:
            copy_all([xs[i] for i in inside], [parts[i] for i in inside])
        dst._values = dict(zip(dst._keys, xs, strict=True))
    elif free or not writable(xs)[1]:
        copy_all(xs, parts, known)
    else:  # conjugates and negative views, or some that lie over others
        with torch.no_grad():
            for x, part in zip(xs, parts, strict=True):
                x.copy_(part)


def _is_apart(xs: list[Tensor], known: Metadata, vector: Tensor) -> bool:
    theirs = metadata_of([vector])
    return theirs is not None and known_apart(xs, known, [vector], theirs)


def _real_where_they_are(xs: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """Of a complex vector, as ``to_vector`` makes it of real and complex ones: real parts for real ones."""
    for x, part in zip(xs, parts, strict=True):
        if not x.is_complex() and bool(part.detach().imag.any()):
            raise TypeError(
                "copy_: expected real numbers for the real tensors among complex ones, got some with an "
                "imaginary part; nothing was written"
            )
    return [part if x.is_complex() else part.real for x, part in zip(xs, parts, strict=True)]


def _check_parameters(xs: list[Tensor], vector: Tensor, free: bool) -> None:
    if vector.requires_grad and keeps_graph(None):
        raise RuntimeError(
            "copy_: expected src without a graph, as what is written into parameters has no derivative, got "
            "one that is being differentiated; pass src.detach(), or let f take the parameters as arguments"
        )
    if not (free or all(map(can_be_written, xs))):
        raise ValueError(
            "copy_: expected writable parameters, got an expanded or sparse one, or one made in "
            "torch.inference_mode(); nothing was written"
        )


def _to_vector(vector: Tensor, xs: list[Tensor], known: Metadata | None) -> None:
    _check_dtypes([vector.dtype], [x.dtype for x in xs])
    if not can_be_written(vector):
        raise ValueError(
            "copy_: expected dst to be a writable vector, got an expanded or sparse one, or one made in "
            "torch.inference_mode()"
        )
    if recorded(xs) and keeps_graph(None):
        vector.copy_(flatten(xs))
        return
    with torch.no_grad():
        cast = torch.is_autocast_enabled(vector.device.type)  # it would put them together in another dtype
        if known is not None and len(known.groups) == 1 and vector.nbytes <= _SMALL and not cast:
            vector.copy_(flatten(xs))
        elif all_apart([vector], xs) or not (is_unresolved(vector) or AddressRanges(xs).meets(vector)):
            dense = [x if x.layout is torch.strided else x.to_dense() for x in xs]
            copy_all(parts_of(vector, xs, known), dense)
        else:
            vector.copy_(flatten(xs))
