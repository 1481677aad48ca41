# SPDX-License-Identifier: Apache-2.0
"""What `recsys doctor` knows: the supported versions, probes that run in child processes, and how to mend what is broken.

Nothing here imports torch, or any library that it probes, into the calling process.
"""
