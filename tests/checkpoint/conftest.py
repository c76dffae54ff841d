"""The random models of `tests/model`, for the tests of their files."""

from tests.model.conftest import architecture

__all__ = ["architecture"]
