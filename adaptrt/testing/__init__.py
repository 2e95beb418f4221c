"""The conformance kit: a plugin's tests subclass one of these. Of all adaptrt only this package needs pytest.

class TestMine(VariantConformance): ...    a variant (spec/plugins.md)
class TestMine(BackendConformance): ...    a backend (spec/backend.md)
"""

import pytest

pytest.register_assert_rewrite("adaptrt.testing.backend", "adaptrt.testing.variant")

from adaptrt.testing.backend import BackendConformance  # noqa: E402
from adaptrt.testing.variant import VariantConformance  # noqa: E402

__all__ = ["BackendConformance", "VariantConformance"]
