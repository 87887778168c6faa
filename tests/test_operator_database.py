"""Derivatives of all operators in PyTorch's own database, against plain autograd row by row."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import operator_samples as plain
import pytest
import torch
from operator_samples import Sample, samples, seeded, weighted
from torch import Tensor

from torchzygote import checkpointed, diaghessian, gradient, hessian, jacobian

try:
    OPERATORS = plain.operators()
except ImportError as error:
    pytest.skip(f"PyTorch's own test tools can't be imported: {error}", allow_module_level=True)

Derivatives = Callable[[Sample], Sequence[Tensor]]
Outcome = Sequence[Tensor] | Exception

pytestmark = [
    pytest.mark.filterwarnings("ignore:rows are computed one at a time"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


class Exempt(NamedTuple):
    """Checks of an operator that fail, and must go on failing, unless that depends on the version."""

    checks: str
    why: str
    always: bool = True


EXEMPT = {
    "__rpow__": Exempt("samples", "in all of them a negative number is raised to a fraction, which is NaN"),
    "nn.functional.linear_cross_entropy.chunked": Exempt(
        "hessian diaghessian", "refused: PyTorch would give zeros (limitations)"
    ),
    "nn.functional.multi_head_attention_forward": Exempt(
        "sparse forward",
        "the derivative by the query is 1e-215: rounding noise, of which is warned (limitations)",
    ),
    "nn.functional.scaled_dot_product_attention": Exempt(
        "hessian diaghessian",
        "right by the unfused formula, where PyTorch has none (limitations)",
        always=False,
    ),
    "special.entr": Exempt("samples", "its result is -inf at negative numbers, and all samples have some"),
    "sparse.sampled_addmm": Exempt("samples", "its result is a sparse matrix"),
}


def _jacobians(sample: Sample, **options: Any) -> list[Tensor]:
    return [J.to_dense() for J in jacobian(sample.f, *sample.xs, **options)]


def _gradients_checkpointed(sample: Sample) -> list[Tensor]:
    found = gradient(lambda *xs: weighted(checkpointed(sample.f, *xs)), *sample.xs)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, sample.xs, strict=True)]


def _plain_jacobians(sample: Sample) -> list[Tensor]:
    return plain.jacobians(sample.f, sample.xs)


def _plain_gradients(sample: Sample) -> list[Tensor]:
    return plain.gradients(lambda *xs: weighted(sample.f(*xs)), sample.xs)


def _plain_hessian(sample: Sample) -> list[Tensor]:
    return [plain.hessian(*sample.loss())]


def _plain_diagonal(sample: Sample) -> list[Tensor]:
    (H,), x = _plain_hessian(sample), sample.xs[0]
    return [H.diagonal().reshape(x.shape) if x.dim() else H]


# check -> the package's derivatives, those of plain autograd
CHECKS: dict[str, tuple[Derivatives, Derivatives]] = {
    "jacobian": (_jacobians, _plain_jacobians),
    "sparse": (lambda sample: _jacobians(sample, sparse=True), _plain_jacobians),
    "forward": (lambda sample: _jacobians(sample, mode="forward"), _plain_jacobians),
    "checkpointed": (_gradients_checkpointed, _plain_gradients),
    "hessian": (lambda sample: [hessian(*sample.loss())], _plain_hessian),
    "diaghessian": (lambda sample: diaghessian(*sample.loss()), _plain_diagonal),
}


@pytest.fixture(autouse=True)
def memory_full_of_nan() -> Iterator[None]:
    """What nobody has written is NaN: freed memory often holds the very numbers that are asked for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _outcome(derivatives: Derivatives, sample: Sample) -> Outcome:
    try:
        return seeded(derivatives, sample)
    except Exception as error:
        return error


def _difference(found: Outcome, expected: Outcome) -> str | None:
    if isinstance(expected, Exception):
        same = isinstance(found, Exception) and not isinstance(found, Warning)
        return None if same else f"{found!r}, but plain autograd raises {expected!r}"
    if isinstance(found, Exception):
        return repr(found)
    for a, b in zip(found, expected, strict=True):
        scale = b[b.isfinite()].abs().sum().item()
        try:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * scale, equal_nan=True)
        except AssertionError as error:
            return f"{error}\nfound {a}\nexpected {b}" if a.numel() <= 100 else str(error)
    return None


@contextmanager
def _warnings_of_others() -> Iterator[list[str]]:
    """What PyTorch warns of without the package."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += {str(warning.message) for warning in caught}


def _failures(sample: Sample, checks: Sequence[str]) -> dict[str, str]:
    """check -> what is wrong."""
    with _warnings_of_others() as messages:
        expected = {CHECKS[check][1]: _outcome(CHECKS[check][1], sample) for check in checks}
    with warnings.catch_warnings():
        for message in messages:
            warnings.filterwarnings("ignore", message=re.escape(message))
        found = {check: _outcome(CHECKS[check][0], sample) for check in checks}
    differences = {check: _difference(found[check], expected[CHECKS[check][1]]) for check in checks}
    failures = {check: difference for check, difference in differences.items() if difference is not None}
    if len(sample.xs) > 1 and isinstance(expected[_plain_jacobians], Exception):
        # one of the arguments has no derivative
        failures |= _failures(sample.by_first(), [check for check in checks if "hessian" not in check])
    return failures


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    op = OPERATORS[name]
    checks = ["jacobian", "sparse", "checkpointed"]
    checks += ["forward"] * op.supports_forward_ad + ["hessian", "diaghessian"] * op.supports_gradgrad
    with _warnings_of_others():
        found = samples(op)
    failures = {} if found else {"samples": "none has floating arguments and a finite floating result"}
    for sample in found:
        failures |= _failures(sample, checks)
    exempt = EXEMPT.get(name, Exempt("", ""))
    unexpected = {check: how for check, how in failures.items() if check not in exempt.checks.split()}
    assert not unexpected, "\n".join(f"{check}: {how}" for check, how in unexpected.items())
    if exempt.always:
        assert set(exempt.checks.split()) == set(failures), "what no longer fails needs no exemption"
