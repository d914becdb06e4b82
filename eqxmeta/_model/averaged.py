"""A model beside the state in a run's file: the average of its weights, or whichever is meant."""

import equinox as eqx
from jaxtyping import PyTree

from .state import TrainState

# The key path of that model in the file.
AVERAGED = ".averaged"


class _WithAveraged(eqx.Module):
    """The leaves of a `TrainState` under their own names, and one part more."""

    step: PyTree
    model: PyTree
    opt_state: PyTree
    averaged: PyTree


def with_averaged(state: TrainState, averaged: PyTree) -> PyTree:
    """What is saved in the place of `state`: `load_model` takes `averaged` out of it, and whoever
    loads a `TrainState` the state."""
    return _WithAveraged(state.step, state.model, state.opt_state, averaged)
