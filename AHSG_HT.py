"""Lets `from AHSG_HT import AHSG_HT` work: Python cannot import a file name with a hyphen, so this module becomes
AHSG-HT.py.
"""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(__name__, Path(__file__).with_name("AHSG-HT.py"))
# The import system hands out what stands in sys.modules, so classes live under this one name and can be pickled.
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
