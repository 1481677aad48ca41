# SPDX-License-Identifier: Apache-2.0
"""The steps of a recipe as assets of Dagster, which is imported only here."""
