# SPDX-License-Identifier: Apache-2.0
"""Checks of a day's events before anything is made of them: what fails stops the day."""

from pipelines.checks.config import ColumnCheck, DataChecks, Volume
from pipelines.checks.examine import KINDS, CheckReport, ChecksFailed, Finding, examine

__all__ = ["KINDS", "CheckReport", "ChecksFailed", "ColumnCheck", "DataChecks", "Finding", "Volume", "examine"]
