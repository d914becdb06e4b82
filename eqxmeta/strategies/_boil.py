"""BOIL: the inner loop adapts the body only."""

from typing import TYPE_CHECKING

from .._strategy.head import AdaptsByHead, Body, Head


class BOIL(AdaptsByHead):
    """Body only update in the inner loop: MAML in which all but the head adapts.

    Oh, Yoo, Kim, Yun 2021 (arXiv 2008.08882), section 3: the inner learning rate of the head is
    zero, `body ← body - α ∇_body loss(body, head; support)`, and the outer step descends
    `loss(body_K, head; query)` in both.

    Arguments as for `ANIL`.
    """

    if TYPE_CHECKING:  # else a checker takes the fields for the arguments
        __init__ = AdaptsByHead.__init__

    @staticmethod
    def chosen(head: Head) -> Body:
        return Body(head)
