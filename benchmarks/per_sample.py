"""A gradient for each sample, by all weights of a network: part of the table of the first order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote import jacobian
from torchzygote.params import Params

from ._harness import Contender, Row, compare
from ._networks import Transformer, images, mlp
from .peers import torch_peer

# The losses of all samples from what a network gives for them.
Losses = Callable[[Tensor], Tensor]


def opacus(net: nn.Module, X: Tensor, losses: Losses) -> Callable[[], list[Tensor]] | None:
    """Opacus, which has rules for modules that it knows and collects what they get by hooks."""
    peer = torch_peer("opacus.grad_sample")
    if peer is None:
        return None
    theirs = peer.GradSampleModule(copy.deepcopy(net), loss_reduction="sum")
    theirs.forbid_grad_accumulation()

    def rows() -> list[Tensor]:
        theirs.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no input requires a gradient
            losses(theirs(X)).sum().backward()
        found = [p.grad_sample for p in theirs.parameters()]
        for p in theirs.parameters():
            p.grad_sample = None
        return found

    return rows


def compared(name: str, net: nn.Module, X: Tensor, losses: Losses, one: Losses, *known: Tensor) -> Row:
    """``one``: the loss of a single sample; ``known``: what that needs besides, for each sample."""
    params = Params(net)
    weights = {key: p.detach() for key, p in net.named_parameters()}
    of_one = lambda w, x, *known: one(torch.func.functional_call(net, w, (x.unsqueeze(0),)), *known)
    each = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, *[0] * (1 + len(known))))
    of_all = lambda w: losses(torch.func.functional_call(net, w, (X,)))
    ours = lambda: jacobian(lambda: losses(net(X)), params)
    peers: dict[str, Contender] = {
        "vmap(grad), a function of one sample": lambda: each(weights, X, *known),
        "torch.func.jacrev": lambda: torch.func.jacrev(of_all)(weights),
    }
    theirs = opacus(net, X, losses)
    if theirs is not None:
        peers["Opacus"] = theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fused attention is batched by a loop
        by_hand = each(weights, X, *known).values()
        for mine, other in zip(ours().values(), by_hand, strict=True):
            torch.testing.assert_close(mine, other.reshape(len(X), -1), atol=1e-5, rtol=1e-4)
        return compare(
            f"jacobian by Params, losses of {len(X)} samples, {name}",
            ours,
            peers,
            rounds=7,
            note="Opacus takes modules that it knows, and checks nothing" if theirs is not None else "",
        )


def classifier(name: str, net: nn.Module, X: Tensor, classes: int) -> Row:
    """Cross entropies."""
    labels = torch.randint(0, classes, (len(X),))
    losses = lambda scores: F.cross_entropy(scores, labels, reduction="none")
    return compared(name, net, X, losses, lambda scores, label: F.cross_entropy(scores[0], label), labels)


def language(sequences: int = 32, length: int = 32, words: int = 65) -> Row:
    """The mean loss of each sequence."""
    text = torch.randint(0, words, (sequences, length + 1))
    X, following = text[:, :-1], text[:, 1:]
    losses = lambda scores: F.cross_entropy(scores.mT, following, reduction="none").mean(1)
    one = lambda scores, following: F.cross_entropy(scores[0], following)
    return compared("transformer of two blocks", Transformer(words, length), X, losses, one, following)


def rows() -> Iterator[Row]:
    """Dense networks, a convolutional one and a transformer."""
    for sizes, samples in (((784, 100, 10), 128), ((20, 32, 32, 4), 1024)):
        name = f"network {'-'.join(map(str, sizes))}"
        yield classifier(name, mlp(*sizes), torch.randn(samples, sizes[0]), sizes[-1])
    yield classifier("two convolutions, 28 by 28", images(), torch.randn(64, 1, 28, 28), 10)
    yield language()
