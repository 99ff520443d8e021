from __future__ import annotations

import pytest

from distssl.errors import first_line


@pytest.mark.parametrize(("said", "shown"), [("a\nb", "a"), ("a", "a"), ("", "OSError"), ("\nb", "OSError")])
def test_an_error_is_said_in_one_line(said: str, shown: str) -> None:
    assert first_line(OSError(said)) == shown
