"""Plain PyTorch: a Python loop over tasks, the forward pass written out on explicit weights."""

import numpy as np
import torch
from torch.nn import functional as F

from .._workload import B1, B2, EPS, INNER_RATE, OUTER_RATE, READ_EVERY, Tasks, Weights, sample
from . import EXTRAS


def parameters(weights: Weights) -> list[torch.Tensor]:
    return [torch.tensor(leaf, requires_grad=True) for layer in weights for leaf in layer]


def predict(params, x):
    w1, b1, w2, b2, w3, b3 = params
    x = F.relu(F.linear(x, w1, b1))
    x = F.relu(F.linear(x, w2, b2))
    return F.linear(x, w3, b3)


def meta_loss(params: list[torch.Tensor], tasks: Tasks) -> torch.Tensor:
    losses = []
    for support_x, support_y, query_x, query_y in zip(*map(torch.from_numpy, tasks), strict=True):
        support_loss = F.mse_loss(predict(params, support_x), support_y)
        grads = torch.autograd.grad(support_loss, params, create_graph=True)
        adapted = [p - INNER_RATE * g for p, g in zip(params, grads, strict=True)]
        losses.append(F.mse_loss(predict(adapted, query_x), query_y))
    return torch.stack(losses).mean()


class Peer:
    name = "PyTorch, a task at a time"
    extra = EXTRAS["torch_loop"]

    def __init__(self, weights: Weights):
        self.weights = weights
        self.loss = None

    def meta_gradient(self, tasks: Tasks) -> list[np.ndarray]:
        params = parameters(self.weights)
        return [g.numpy() for g in torch.autograd.grad(meta_loss(params, tasks), params)]

    def train(self, steps: int) -> None:
        rng = np.random.default_rng(0)
        params = parameters(self.weights)
        # Fused: the cheapest Adam that torch has, on the CPU too.
        optimizer = torch.optim.Adam(params, lr=OUTER_RATE, betas=(B1, B2), eps=EPS, fused=True)
        for i in range(steps):
            optimizer.zero_grad()
            value = meta_loss(params, sample(rng))
            value.backward()
            optimizer.step()
            if i % READ_EVERY == 0 or i == steps - 1:
                self.loss = value.item()
