"""``python -m ffmerge.runtime_tests --package DIR``: the checks on the device itself.

``pytest --pyargs`` alone would not do: it reads this folder's conftest after the options.
"""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    here = str(Path(__file__).parent)
    sys.exit(pytest.main([here, "-p", "no:cacheprovider", *sys.argv[1:]]))
