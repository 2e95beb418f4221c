"""The conformance kit: a plugin's tests subclass one of its classes. Only this package needs pytest."""

import pytest

pytest.register_assert_rewrite("adaptrt.testing.backend")

from adaptrt.testing.backend import BackendConformance  # noqa: E402

__all__ = ["BackendConformance"]
