from eqxmeta._callback import Callback as Callback

from ._adaptation_plot import AdaptationPlot as AdaptationPlot
from ._checkpoint import Checkpoint as Checkpoint
from ._confusion import Confusion as Confusion
from ._early_stopping import EarlyStopping as EarlyStopping
from ._evaluate import Evaluate as Evaluate
from ._histograms import Histograms as Histograms
from ._jsonl import JSONL as JSONL
from ._lambda import Lambda as Lambda
from ._progress_bar import ProgressBar as ProgressBar
from ._tensorboard import TensorBoard as TensorBoard
