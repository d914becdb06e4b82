"""What learns new classes from a few photographs of each."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from .._arguments import check_argument
from .._errors import explain, succeeds
from .._images.format import ImageFormat
from .._images.images import Images
from .._model.check import check_model
from .._model.support_statistics import TransductiveLayer, has_layer
from .._strategy.jit import strategy_jit
from .._strategy.strategy import Strategy, adapted_model
from .classifier import Classifier, as_image, output_shape


class Learner(eqx.Module):
    """A trained model that learns new classes, each from a few photographs of any number.

        state = em.load_best("checkpoints/photos", strategy, model)
        learner = em.Learner(strategy, state.model, images=train)
        classifier = learner.adapt({"Avocado": ["a.jpg", "b.jpg"], "Kiwi": ["k.jpg"]})
        classifier("new.jpg")  # [("Avocado", 0.93), ("Kiwi", 0.07)]

    Photographs are read as training read them: `images` is what `from_folder` returned, of which
    the learner keeps no more than how it was read, its size, mode and scale (or its `format`, where
    the images are not at hand).

    - `strategy`, `model`: those of the run, `model` what `TrainState.model` holds.

    Raises `TypeError` or `ValueError` for arguments that are not as above, for a strategy that does
    not classify, and for a model with `eqxmeta.nn.BatchNorm`, whose prediction of one photograph
    depends on those that are predicted with it. Nothing is compiled before `adapt`.
    """

    strategy: Strategy
    model: PyTree = eqx.field(repr=False)
    format: ImageFormat = eqx.field(static=True)

    def __init__(self, strategy: Strategy, model: PyTree, *, images: Images | ImageFormat):
        sound, argument = isinstance(strategy, Strategy), "Learner(strategy=...)"
        check_argument(sound, strategy, argument, "an instance of `Strategy`", TypeError)
        check_model(model, "Learner(model=...)", trained=True, baseline=True)
        sound, expected = isinstance(images, Images | ImageFormat), "what `from_folder` returns"
        check_argument(sound, type(images), "Learner(images=...)", expected, TypeError)
        if has_layer(model, TransductiveLayer):
            message = "`Learner(model=...)` would predict each photograph by itself alone."
            received = "a model with `eqxmeta.nn.BatchNorm`: it needs many, predicted together"
            expected = "`eqxmeta.nn.SupportNorm`, which takes the photographs that are given"
            raise ValueError(explain(message, received, expected))
        self.strategy = strategy
        self.model = model
        self.format = images.format if isinstance(images, Images) else images
        self.outputs(2)

    def adapt(self, photographs: Mapping[str, Any]) -> Classifier:
        """A classifier of the classes that `photographs` names, with a list of paths or arrays for
        each: a few, and not as many of each class.

        An array is `[channels, height, width]`, uint8 or floats in [0, 1]. The same photographs
        give the same classifier. Each total number of photographs is compiled once.

        Raises `TypeError` or `ValueError` for a class without photographs, for an array of another
        shape, dtype or scale, and for more classes than the model has outputs; and what
        `read_image` raises.
        """
        names, x, y = labelled(photographs, self.format)
        outputs = self.outputs(len(x))
        if outputs < len(photographs):
            message = "The model has too few outputs."
            received = f"{len(photographs)} classes, of which it tells {outputs} apart"
            expected = f"{outputs} classes or fewer; or a strategy for any number, such as ProtoNet"
            raise ValueError(explain(message, received, expected))
        support = jnp.asarray(x), jnp.asarray(y)
        # With weights a loss knows that the outputs beyond these classes stand for none.
        weighted = *support, jnp.ones(len(x))
        if len(names) < outputs and succeeds(lambda: self._shapes(weighted)):
            support = weighted
        return Classifier(names, _adapted(self.strategy, self.model, support), self.format)

    def _shapes(self, support: PyTree) -> PyTree:
        """Of the adapted model; its loss on `support` has been traced too."""

        def adapt_and_measure(model: PyTree, support: PyTree) -> PyTree:
            adapted = _adapt(self.strategy, model, support)
            self.strategy.loss(adapted, support, None)
            return adapted

        return eqx.filter_eval_shape(adapt_and_measure, self.model, support)

    def outputs(self, examples: int) -> int:
        """How many classes the adapted model tells apart. Raises `ValueError` if that is none."""
        x = jax.ShapeDtypeStruct((examples, *self.format.shape), jnp.zeros(()).dtype)
        y = jax.ShapeDtypeStruct((examples,), jnp.int32)
        expected = (
            "a strategy of classes: a loss of logits and class numbers, such as "
            "`eqxmeta.losses.cross_entropy`, and a model for such images"
        )
        message = "`Learner` cannot adapt to classes of images."
        try:
            shape = output_shape(self._shapes((x, y)), self.format)
        except (TypeError, ValueError) as error:
            received = f"{type(self.strategy).__name__}: {str(error).splitlines()[0]}"
            raise ValueError(explain(message, received, expected)) from error
        if len(shape) != 1:
            received = f"a model whose output is {list(shape)}"
            raise ValueError(explain(message, received, expected))
        return shape[0]


def labelled(
    photographs: Any, format: ImageFormat
) -> tuple[tuple[str, ...], Float[np.ndarray, "n channels height width"], Int[np.ndarray, " n"]]:
    """The names of the classes, and the photographs with the number of their class. Raises as
    `Learner.adapt`."""
    sound = isinstance(photographs, Mapping) and len(photographs) > 0
    expected = 'photographs by name, {"Avocado": ["a.jpg", "b.jpg"], "Kiwi": ["k.jpg"]}'
    argument = "adapt(photographs=...)"
    check_argument(sound, photographs, argument, expected, TypeError, "has no classes")
    examples, labels = [], []
    for label, (name, photos) in enumerate(photographs.items()):
        argument = f"photographs[{name!r}]"
        sound = isinstance(photos, Sequence | np.ndarray) and not isinstance(photos, str)
        expected = "a list of paths or of arrays [channels, height, width]"
        check_argument(sound, photos, argument, expected, TypeError, "is not a list")
        check_argument(len(photos), photos, argument, expected, ValueError, "is empty")
        examples += [as_image(photo, format, argument) for photo in photos]
        labels += [label] * len(photos)
    return tuple(map(str, photographs)), np.stack(examples), np.array(labels, np.int32)


def _adapt(strategy: Strategy, model: PyTree, support: PyTree) -> PyTree:
    return adapted_model(strategy, model, support, jax.random.key(0))


@strategy_jit()
def _adapted(strategy: Strategy, model: PyTree, support: PyTree) -> PyTree:
    return _adapt(strategy, model, support)
