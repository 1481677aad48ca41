# SPDX-License-Identifier: Apache-2.0
"""The floor that every package stands on: configuration, components, schemas, status, deadlines, errors. Imports no torch."""
