"""Data: the growing DataLoader and the image sets. Downloads go into this folder too (git ignores them)."""

from data.cifar import NoData
from data.image_files import ImageFiles
from data.images import ImageArrays
from data.loader import DataLoader, GrowingBatchSampler, check_shared_memory, first_images
from data.sources import DATASETS, Data, Spec, find_or_download, load, load_imagenet

__all__ = ["DATASETS", "Data", "DataLoader", "GrowingBatchSampler", "ImageArrays", "ImageFiles", "NoData", "Spec"]
__all__ += ["check_shared_memory", "find_or_download", "first_images", "load", "load_imagenet"]
