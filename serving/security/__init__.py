# SPDX-License-Identifier: Apache-2.0
"""Who may ask, how much, and how large: layers around the application, which see a request before any route does.

`Credentials` tells who a caller is and what it may do; `Guard` asks it, and keeps to each caller's rate; `Limits` reads a body whole,
up to a size, a depth and a time; `serving.security.protocol` gives up connections that do not get their headers out.
"""

from serving.security.credentials import Caller, Credentials
from serving.security.guard import Guard
from serving.security.limits import Limits

__all__ = ["Caller", "Credentials", "Guard", "Limits"]
