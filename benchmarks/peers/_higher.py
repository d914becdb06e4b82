"""`higher`: a task at a time in `innerloop_ctx`, as in its MAML example."""

import higher
import numpy as np
import torch
from torch.nn import functional as F

from .._workload import B1, B2, EPS, INNER_RATE, OUTER_RATE, READ_EVERY, Tasks, Weights, sample
from . import EXTRAS
from ._torch_func import network


def accumulate(net: torch.nn.Module, inner: torch.optim.SGD, tasks: Tasks) -> torch.Tensor:
    """The meta-loss; its gradient is added to that of `net`."""
    losses = []
    for support_x, support_y, query_x, query_y in zip(*map(torch.from_numpy, tasks), strict=True):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
            optimizer.step(F.mse_loss(fast(support_x), support_y))
            loss = F.mse_loss(fast(query_x), query_y) / len(tasks[0])
            losses.append(loss.detach())
            loss.backward()
    return torch.stack(losses).sum()


class Peer:
    name = "higher"
    extra = EXTRAS["higher"]

    def __init__(self, weights: Weights):
        self.weights = weights
        self.loss = None

    def meta_gradient(self, tasks: Tasks) -> list[np.ndarray]:
        net = network(self.weights)
        accumulate(net, torch.optim.SGD(net.parameters(), lr=INNER_RATE), tasks)
        return [p.grad.numpy() for p in net.parameters()]

    def train(self, steps: int) -> None:
        rng = np.random.default_rng(0)
        net = network(self.weights)
        inner = torch.optim.SGD(net.parameters(), lr=INNER_RATE)
        # Fused: the cheapest Adam that torch has, on the CPU too.
        outer = torch.optim.Adam(
            net.parameters(), lr=OUTER_RATE, betas=(B1, B2), eps=EPS, fused=True
        )
        for i in range(steps):
            outer.zero_grad()
            value = accumulate(net, inner, sample(rng))
            outer.step()
            if i % READ_EVERY == 0 or i == steps - 1:
                self.loss = value.item()
