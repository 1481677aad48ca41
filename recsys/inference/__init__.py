# SPDX-License-Identifier: Apache-2.0
"""From a request to an explained list, the same way offline and online."""
