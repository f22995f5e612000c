"""The types that signatures of the package name, to annotate one's own code with."""

from ._aliases import Spec
from ._choice import Candidate
from ._completion import Dictionary
from ._completion_request import ChatOptions, Messages, TextOptions
from ._embeddings import ImageEmbedding, Images, Picture
from ._explain import Covered
from ._hub_client import RemoteFile
from ._lib import TensorInfo
from ._picture_files import OnTruncated
from ._pixels import Color
from ._room import KvCells
from ._scorer import Normalize
from ._sources import Readable
from .answer import FinishReason
from .formats import CacheType
from .images import HasArray, ImageSource
from .llava import FloatArray, ImageMerge, Precision, Progress

__all__ = [
    "CacheType",
    "Candidate",
    "ChatOptions",
    "Color",
    "Covered",
    "Dictionary",
    "FinishReason",
    "FloatArray",
    "HasArray",
    "ImageEmbedding",
    "ImageMerge",
    "ImageSource",
    "Images",
    "KvCells",
    "Messages",
    "Normalize",
    "OnTruncated",
    "Picture",
    "Precision",
    "Progress",
    "Readable",
    "RemoteFile",
    "Spec",
    "TensorInfo",
    "TextOptions",
]
