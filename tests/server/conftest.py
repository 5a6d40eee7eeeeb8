from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # MONAI Label's packages import modules that Python 3.13 no longer has; warnings are errors in our tests
    warnings.simplefilter("ignore")
    import monailabel.app  # noqa: F401
