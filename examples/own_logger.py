"""The run in Weights & Biases or MLflow: a logger of one's own.

pip install wandb && wandb login && python examples/own_logger.py
"""

import equinox as eqx
import jax
import optax

import eqxmeta as em
from eqxmeta.callbacks import Evaluate, Logger, ProgressBar


class WeightsAndBiases(Logger):
    """What `TensorBoard` shows, under the same names. `options` are those of `wandb.init`."""

    def __init__(self, *, every=10, **options):
        super().__init__(every=every)
        self.options = options

    def on_fit_start(self, run):
        import wandb  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(config=run.config, **self.options)

    def write(self, step, values):
        self.run.log(dict(values), step=step)

    def write_image(self, step, name, pixels):
        import wandb  # pyright: ignore[reportMissingImports]

        self.run.log({name: wandb.Image(pixels)}, step=step)

    def on_fit_end(self, run):
        self.run.finish()

    def on_exception(self, run, error):
        self.run.finish(exit_code=1)


class MLflow(Logger):
    """The same, into the run that is active or a new one."""

    def on_fit_start(self, run):
        import mlflow  # pyright: ignore[reportMissingImports]

        self.mlflow = mlflow
        if mlflow.active_run() is None:
            mlflow.start_run()
        mlflow.log_params({name: str(value)[:500] for name, value in run.config.items()})

    def write(self, step, values):
        self.mlflow.log_metrics(dict(values), step=step)

    def on_fit_end(self, run):
        self.mlflow.end_run()

    def on_exception(self, run, error):
        self.mlflow.end_run("FAILED")


def main(logger, steps=2_000):
    tasks = em.tasks.Sinusoid(shots=10, queries=10)
    model = em.nn.fast(eqx.nn.MLP(1, 1, width_size=40, depth=2, key=jax.random.key(0)))
    strategy = em.MAML(em.losses.mse, em.InnerLoop(optax.sgd(0.01), steps=1), optax.adam(1e-3))
    callbacks = [ProgressBar(), Evaluate(tasks, every=steps // 4, num_tasks=100), logger]
    return em.Trainer(strategy, meta_batch_size=25, callbacks=callbacks).fit(model, tasks, steps)


if __name__ == "__main__":
    main(WeightsAndBiases(project="eqxmeta"))
