# SPDX-License-Identifier: Apache-2.0
"""Our stores behind Feast's interfaces: ``feature_store.yaml`` names the classes of `online_store` and `offline_store` by their paths.

Imported in Feast's environment, which needs pandas 2: beside Feast only numpy, pyarrow, polars, pydantic, PyYAML and redis are needed.
"""
