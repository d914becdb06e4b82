"""Plain PyTorch: MAML on Conv-4, a Python loop over tasks, second derivatives by autograd."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

INNER_RATE = 0.4


def predict(params: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for i in range(0, 16, 4):
        weight, bias, scale, shift = params[i : i + 4]
        x = F.conv2d(x, weight, bias, padding=1)
        x = F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)
        x = F.max_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), *params[16:])


def meta_loss(params: Sequence[torch.Tensor], tasks: Sequence[torch.Tensor]) -> torch.Tensor:
    losses = []
    for support_x, support_y, query_x, query_y in zip(*tasks, strict=True):
        support_loss = F.cross_entropy(predict(params, support_x), support_y)
        grads = torch.autograd.grad(support_loss, params, create_graph=True)
        adapted = [p - INNER_RATE * g for p, g in zip(params, grads, strict=True)]
        losses.append(F.cross_entropy(predict(adapted, query_x), query_y))
    return torch.stack(losses).mean()


class Peer:
    """`weights`: of every block the kernel, bias, scale and shift; the head's weight and bias."""

    name = "PyTorch, a task at a time"

    def __init__(self, weights: Sequence[np.ndarray], tasks: Sequence[np.ndarray]):
        self.weights = weights
        self.tasks = [
            torch.tensor(x, dtype=torch.int64 if x.dtype.kind == "i" else None) for x in tasks
        ]

    def parameters(self) -> list[torch.Tensor]:
        return [torch.tensor(w, requires_grad=True) for w in self.weights]

    def meta_gradient(self) -> list[np.ndarray]:
        params = self.parameters()
        return [g.numpy() for g in torch.autograd.grad(meta_loss(params, self.tasks), params)]

    def train(self, steps: int) -> float:
        params = self.parameters()
        optimizer = torch.optim.Adam(params, lr=1e-3, fused=True)
        for _ in range(steps):
            optimizer.zero_grad()
            value = meta_loss(params, self.tasks)
            value.backward()
            optimizer.step()
        return value.item()
