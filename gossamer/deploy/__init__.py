"""Deploy: pack (measure, choose, swap), fuse, save, load, unpack, and the dense engines to compare with.

`gossamer.deploy.engines` compares with dense engines; it is imported by itself, as few need it.
"""

from .load import load, read_record
from .pack import pack, report_of
from .record import PackedLayer, PackReport, Trial
from .save import save
from .unpack import unpack

__all__ = ["PackReport", "PackedLayer", "Trial", "load", "pack", "read_record", "report_of", "save", "unpack"]
