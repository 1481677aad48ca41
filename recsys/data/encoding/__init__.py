# SPDX-License-Identifier: Apache-2.0
"""The parts of `recsys.data.encode.Encoder`: its configuration, reading Arrow columns, coding values, and what fitting learns."""
