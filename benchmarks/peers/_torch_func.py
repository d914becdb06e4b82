"""PyTorch's function transforms: `torch.func`, all tasks at once under `vmap`."""

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from .._workload import B1, B2, EPS, INNER_RATE, OUTER_RATE, READ_EVERY, Tasks, Weights, sample
from . import EXTRAS


def network(weights: Weights) -> nn.Sequential:
    """The MLP as a module, with these weights."""
    layers = []
    for weight, bias in weights:
        linear = nn.Linear(*reversed(weight.shape))
        linear.weight = nn.Parameter(torch.tensor(weight))
        linear.bias = nn.Parameter(torch.tensor(bias))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def meta_loss(net: nn.Module, tasks: Tasks) -> torch.Tensor:
    params = dict(net.named_parameters())

    def loss(params, x, y):
        return F.mse_loss(functional_call(net, params, (x,)), y)

    def task_loss(support_x, support_y, query_x, query_y):
        grads = grad(loss)(params, support_x, support_y)
        adapted = {name: p - INNER_RATE * grads[name] for name, p in params.items()}
        return loss(adapted, query_x, query_y)

    return vmap(task_loss)(*map(torch.from_numpy, tasks)).mean()


class Peer:
    name = "torch.func"
    extra = EXTRAS["torch_func"]

    def __init__(self, weights: Weights):
        self.weights = weights
        self.loss = None

    def meta_gradient(self, tasks: Tasks) -> list[np.ndarray]:
        net = network(self.weights)
        return [g.numpy() for g in torch.autograd.grad(meta_loss(net, tasks), net.parameters())]

    def train(self, steps: int) -> None:
        rng = np.random.default_rng(0)
        net = network(self.weights)
        # Fused: the cheapest Adam that torch has, on the CPU too.
        optimizer = torch.optim.Adam(
            net.parameters(), lr=OUTER_RATE, betas=(B1, B2), eps=EPS, fused=True
        )
        for i in range(steps):
            optimizer.zero_grad()
            value = meta_loss(net, sample(rng))
            value.backward()
            optimizer.step()
            if i % READ_EVERY == 0 or i == steps - 1:
                self.loss = value.item()
