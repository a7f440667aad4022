"""Packages of extras that are missing."""

from __future__ import annotations

import pytest

from ptst.errors import UserError
from ptst.packages import check_package


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    """wandb writes to ./wandb, which Python takes for a package without code where the command is run beside it."""
    check_package("pytest", "this needs", "dev")
    (tmp_path / "logger_that_is_missing").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"this needs the package logger_that_is_missing; pip install 'ptst-lab\[log\]'"
    ):
        check_package("logger_that_is_missing", "this needs", "log")
