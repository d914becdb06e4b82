"""Callbacks of `eqxmeta.Trainer`: logging, checkpoints, evaluation, early stopping."""

from eqxmeta._callback.callback import Callback as Callback
from eqxmeta.callbacks._adaptation_plot import AdaptationPlot as AdaptationPlot
from eqxmeta.callbacks._checkpoint import Checkpoint as Checkpoint
from eqxmeta.callbacks._confusion import Confusion as Confusion
from eqxmeta.callbacks._early_stopping import EarlyStopping as EarlyStopping
from eqxmeta.callbacks._evaluate import Evaluate as Evaluate
from eqxmeta.callbacks._histograms import Histograms as Histograms
from eqxmeta.callbacks._jsonl import JSONL as JSONL
from eqxmeta.callbacks._lambda import Lambda as Lambda
from eqxmeta.callbacks._logger import Logger as Logger
from eqxmeta.callbacks._progress_bar import ProgressBar as ProgressBar
from eqxmeta.callbacks._tensorboard import TensorBoard as TensorBoard
