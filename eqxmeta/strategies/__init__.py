from ._fomaml import FOMAML as FOMAML
from ._joint import Joint as Joint
from ._maml import MAML as MAML
from ._reptile import Reptile as Reptile
