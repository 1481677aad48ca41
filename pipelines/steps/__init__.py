# SPDX-License-Identifier: Apache-2.0
"""The steps of a run, each a function of plain inputs."""
