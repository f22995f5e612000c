"""The types that signatures of the package name, to annotate one's own code with."""

from ._aliases import Spec
from ._choice import Candidate
from ._embeddings import ImageEmbedding, Images, Picture
from ._hub_client import RemoteFile
from ._lib import TensorInfo
from ._picture_files import OnTruncated
from ._pixels import Color
from ._room import KvCells
from ._sources import Readable
from .answer import FinishReason
from .formats import CacheType
from .images import HasArray, ImageSource
from .llava import FloatArray, ImageMerge, Precision, Progress

__all__ = [
    "CacheType",
    "Candidate",
    "Color",
    "FinishReason",
    "FloatArray",
    "HasArray",
    "ImageEmbedding",
    "ImageMerge",
    "ImageSource",
    "Images",
    "KvCells",
    "OnTruncated",
    "Picture",
    "Precision",
    "Progress",
    "Readable",
    "RemoteFile",
    "Spec",
    "TensorInfo",
]
