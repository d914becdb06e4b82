"""TorchOpt: a task at a time with `MetaSGD`, the weights put back after each, as in its MAML
example."""

import numpy as np
import torch
import torchopt
from torch.nn import functional as F

from .._workload import B1, B2, EPS, INNER_RATE, OUTER_RATE, READ_EVERY, Tasks, Weights, sample
from . import EXTRAS
from ._torch_func import network


def meta_loss(net: torch.nn.Module, inner: torchopt.MetaSGD, tasks: Tasks) -> torch.Tensor:
    losses = []
    weights = torchopt.extract_state_dict(net, by="reference")
    state = torchopt.extract_state_dict(inner, by="reference")
    for support_x, support_y, query_x, query_y in zip(*map(torch.from_numpy, tasks), strict=True):
        inner.step(F.mse_loss(net(support_x), support_y))
        losses.append(F.mse_loss(net(query_x), query_y))
        torchopt.recover_state_dict(net, weights)
        torchopt.recover_state_dict(inner, state)
    return torch.stack(losses).mean()


class Peer:
    name = "TorchOpt"
    extra = EXTRAS["torchopt"]

    def __init__(self, weights: Weights):
        self.weights = weights
        self.loss = None

    def meta_gradient(self, tasks: Tasks) -> list[np.ndarray]:
        net = network(self.weights)
        value = meta_loss(net, torchopt.MetaSGD(net, lr=INNER_RATE), tasks)
        return [g.numpy() for g in torch.autograd.grad(value, net.parameters())]

    def train(self, steps: int) -> None:
        rng = np.random.default_rng(0)
        net = network(self.weights)
        inner = torchopt.MetaSGD(net, lr=INNER_RATE)
        # Fused: the cheapest Adam that torch has, on the CPU too.
        outer = torch.optim.Adam(
            net.parameters(), lr=OUTER_RATE, betas=(B1, B2), eps=EPS, fused=True
        )
        for i in range(steps):
            outer.zero_grad()
            value = meta_loss(net, inner, sample(rng))
            value.backward()
            outer.step()
            if i % READ_EVERY == 0 or i == steps - 1:
                self.loss = value.item()
