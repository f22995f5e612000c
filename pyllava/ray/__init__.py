"""Captions on a Ray cluster (extra ``[ray]``)::

    cluster    Ray itself: the connection, what the cluster has, where this process runs in it
    captioner  Captioner and caption_dataset: pictures in a ``ray.data.Dataset``
    workers    files of ``pyllava-cli caption --engine ray``: workers that are replaced when they die

Both sides run the code that a single machine runs: `Llava.batch`, and rows as `pyllava.bulk` makes them.
"""

from .captioner import Captioner, caption_dataset

__all__ = ["Captioner", "caption_dataset"]
