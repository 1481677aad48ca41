# SPDX-License-Identifier: Apache-2.0
"""What the layers of the application tell each other of a request: keys of its ASGI scope."""

ARRIVED = "recsys.arrived"
"""Monotonic seconds."""
REQUEST_ID = "recsys.request_id"
"""The caller's id, or a made one."""
REASON = "recsys.reason"
"""Why it was rejected: the value of a `recsys.core.deadline.RejectReason`; absent where it was not."""
VERSION = "recsys.version"
"""Of the bundle that answered; absent where none did."""
FLAGS = "recsys.flags"
"""Of the list; absent where there is none."""

ID_HEADER = "x-request-id"
