"""ANIL: the inner loop adapts the head only."""

from typing import TYPE_CHECKING

from .._strategy.head import AdaptsByHead, Head


class ANIL(AdaptsByHead):
    """Almost no inner loop: MAML in which the head alone adapts, on features that stay.

    Raghu, Raghu, Bengio, Vinyals 2020 (arXiv 1909.09157), section 4: with θ = (body, head) an
    inner step is `head ← head - α ∇_head loss(body, head; support)`, and the outer step descends
    `loss(body, head_K; query)` in both. The body's features of the support set are computed once,
    not at every inner step (unless the loss has a `key` and the body drops out).

    - `loss`, `inner`, `optimizer`, `task_chunk`, `learn`: as for `MAML`; `inner.adapt` must be
      `None`.
    - `head`: from the model to its head: `lambda m: m.layers[-1]`. `None`: the model's field
      `head` or, if it has none, the last `eqx.nn.Linear` in the order of the fields.

    `MAML(loss, InnerLoop(..., adapt=head), optimizer)` is the same algorithm.

    Raises `TypeError` or `ValueError` for arguments that are not as above, and `ValueError` when
    used with a model that has no such head.
    """

    if TYPE_CHECKING:  # else a checker takes the fields for the arguments
        __init__ = AdaptsByHead.__init__

    @staticmethod
    def chosen(head: Head) -> Head:
        return head
