# SPDX-License-Identifier: Apache-2.0
"""The server on more than one machine: replicas under Ray Serve, Kubernetes manifests, and copies of online stores for pods."""
