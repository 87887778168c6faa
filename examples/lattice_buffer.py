"""The forward algorithm of a hidden Markov model, written into a Buffer, and what its gradient means.

A casino uses a fair die and, now and then, a loaded one; only the throws are seen. The forward algorithm
fills a table ``alpha[t, state]``, each row from the one before, and ends with the log-likelihood of all
throws. Its gradient with respect to the log-probability of each throw under each die is, exactly, the
posterior probability that this die was thrown at that time: what the backward pass of the forward-backward
algorithm computes by hand. Its gradient with respect to the log transition matrix counts the expected changes
of dice.

The picture, ``examples/output/lattice.png``, shows the posterior, which die it really was, and how far the
gradient is from the forward-backward algorithm.

    python examples/lattice_buffer.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchzygote import Buffer, gradient

OUTPUT = Path(__file__).parent / "output"

STAY = torch.tensor([[0.95, 0.05], [0.10, 0.90]], dtype=torch.float64)  # from fair, from loaded
START = torch.tensor([0.5, 0.5], dtype=torch.float64)
FACES = torch.tensor([[1 / 6] * 6, [0.1] * 5 + [0.5]], dtype=torch.float64)  # the loaded die likes a six


def throw(length: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Which die was thrown, and what it showed."""
    random = torch.Generator().manual_seed(seed)
    dice = torch.empty(length, dtype=torch.int64)
    chances = START
    for t in range(length):
        dice[t] = torch.multinomial(chances, 1, generator=random)[0]
        chances = STAY[dice[t]]
    shown = torch.multinomial(FACES[dice], 1, generator=random)[:, 0]
    return dice, shown


def log_likelihood(scores: Tensor, log_stay: Tensor, log_start: Tensor) -> Tensor:
    """The forward algorithm; ``scores[t, state]`` is the log-probability of throw ``t`` in each state."""
    alpha = Buffer(scores)
    alpha[0] = log_start + scores[0]
    for t in range(1, len(scores)):
        alpha[t] = torch.logsumexp(alpha[t - 1][:, None] + log_stay, dim=0) + scores[t]
    return torch.logsumexp(alpha[-1], dim=0)


def forward_backward(scores: Tensor, stay: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior of each state and expected transitions, by the textbook's two scaled passes."""
    length = len(scores)
    emitted = scores.exp()
    forward, scales = [], []
    row = start * emitted[0]
    for t in range(length):
        row = row if t == 0 else (forward[-1] @ stay) * emitted[t]
        scales.append(row.sum())
        forward.append(row / scales[-1])
    backward = [torch.ones_like(start)]
    for t in range(length - 1, 0, -1):
        backward.append(stay @ (emitted[t] * backward[-1]) / scales[t])
    backward.reverse()
    posterior = torch.stack([f * b for f, b in zip(forward, backward, strict=True)])
    changes = sum(
        torch.outer(forward[t - 1], emitted[t] * backward[t]) * stay / scales[t] for t in range(1, length)
    )
    return posterior, torch.as_tensor(changes)


def plot(path: Path, dice: Tensor, posterior: Tensor, by_hand: Tensor) -> None:
    """Posterior over time above, the difference of the two ways below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 4.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    times = range(len(dice))
    top.fill_between(
        times, 0, 1, where=dice.bool().tolist(), step="mid", color="0.85", label="the loaded die was thrown"
    )
    top.plot(times, posterior[:, 1], color="tab:red", label="gradient of the log-likelihood")
    top.set_ylabel("P(loaded | all throws)")
    top.set_ylim(0, 1)
    top.set_xlim(0, len(dice))
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    difference = (posterior - by_hand).abs().amax(dim=1).clamp(min=1e-18)
    bottom.semilogy(times, difference, ".", color="tab:blue", markersize=3)
    bottom.set_ylabel("difference from\nforward-backward")
    bottom.set_xlabel("throw")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> float:
    """Run the example; returns the largest difference between gradient and forward-backward algorithm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=600, help="number of throws")
    parser.add_argument("--quick", action="store_true", help="60 throws")
    parser.add_argument("--output", type=Path, default=OUTPUT / "lattice.png", help="where the picture goes")
    options = parser.parse_args(arguments)

    dice, shown = throw(60 if options.quick else options.length)
    scores = FACES[:, shown].T.log()
    posterior, changes, _ = gradient(log_likelihood, scores, STAY.log(), START.log())
    by_hand, changes_by_hand = forward_backward(scores, STAY, START)
    of_posterior = float((posterior - by_hand).abs().max())
    of_changes = float((changes - changes_by_hand).abs().max())
    guessed = (posterior[:, 1] > 0.5).long()
    print(f"{len(dice)} throws, log-likelihood {log_likelihood(scores, STAY.log(), START.log()):.3f}")
    print(f"expected changes of dice: {changes[0, 1]:.2f} to loaded, {changes[1, 0]:.2f} back")
    print(
        f"the likelier die is the one thrown in {float((guessed == dice).double().mean()):.1%} of the throws"
    )
    print(
        f"gradient against forward-backward algorithm: {of_posterior:.1e} at most in the posterior, "
        f"{of_changes:.1e} in the expected changes"
    )
    plot(options.output, dice, posterior, by_hand)
    print(f"picture: {options.output}")
    return max(of_posterior, of_changes)


if __name__ == "__main__":
    main()
