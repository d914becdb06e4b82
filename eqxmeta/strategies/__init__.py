"""The meta-learning algorithms."""

from ._anil import ANIL as ANIL
from ._baseline import Baseline as Baseline
from ._baseline import BaselinePlusPlus as BaselinePlusPlus
from ._boil import BOIL as BOIL
from ._cavia import CAVIA as CAVIA
from ._cnp import CNP as CNP
from ._fomaml import FOMAML as FOMAML
from ._imaml import IMAML as IMAML
from ._joint import Joint as Joint
from ._learnt_update import LearntUpdate as LearntUpdate
from ._maml import MAML as MAML
from ._maml_plus_plus import MAMLPlusPlus as MAMLPlusPlus
from ._matching_net import MatchingNet as MatchingNet
from ._meta_curvature import MetaCurvature as MetaCurvature
from ._meta_opt_net import MetaOptNet as MetaOptNet
from ._meta_sgd import MetaSGD as MetaSGD
from ._proto_maml import ProtoMAML as ProtoMAML
from ._proto_net import ProtoNet as ProtoNet
from ._r2d2 import R2D2 as R2D2
from ._relation_net import RelationNet as RelationNet
from ._reptile import Reptile as Reptile
from ._simple_shot import SimpleShot as SimpleShot
from ._t_net import TNet as TNet
