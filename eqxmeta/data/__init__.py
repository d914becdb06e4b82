"""Images on disk, as labelled arrays."""

from .._images.format import ImageFormat as ImageFormat
from .._images.images import Images as Images
from .._images.read import read_image as read_image
from ._augment import random_crop as random_crop
from ._augment import random_flip as random_flip
from ._folder import from_folder as from_folder
from ._npz import from_npz as from_npz
from ._omniglot import omniglot as omniglot
