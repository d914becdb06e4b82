"""Meta-Curvature: MAML with a learnt linear transformation of the gradients."""

from jaxtyping import PyTree

from .._strategy.learnt_rule import AdaptsByRule
from ..rules import KroneckerBlocks


class MetaCurvature(AdaptsByRule):
    """Meta-Curvature: MAML that also learns how the gradient of each layer is transformed.

    Park, Oliva 2019 (arXiv 1902.03356), section 3: an inner step of the weight `W: [out, in]` is
    `W ← W - α M_o G M_i` with its gradient G, and of a convolution's with `M_f` along the kernel
    too; the outer step descends the query loss in θ and in these matrices, which begin as
    identities, with one optimizer. Of a bias every number has a rate.

    Here they transform the updates of `inner.optimizer`: `InnerLoop(optax.sgd(α), steps)` is the
    paper's rule. The matrices are those of every inner step.

    `TrainState.model` is a `MetaParameters` of `model`, the user's own, and `extra`, an
    `eqxmeta.rules.KroneckerBlocks`. A layer from n to m numbers has n² + m² of them.

    `loss`, `inner`, `optimizer`, `task_chunk`, `learn`, `estimator`: as for `MAML`. All matrices
    are learnt; `learn=lambda m: ()` learns nothing else.
    """

    def new_rule(self, params: PyTree) -> KroneckerBlocks:
        return KroneckerBlocks(params)
