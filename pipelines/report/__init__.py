# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML file that shows what a run measured."""

from pipelines.report.render import render, write_report

__all__ = ["render", "write_report"]
