# SPDX-License-Identifier: Apache-2.0
"""`recsys rollback`: put the previous champion back, with all that belongs to it."""

from rich.console import Console

from pipelines.cli._registry import describe, open_registry, parser


def main(argv: list[str]) -> int:
    """The command."""
    options = parser("rollback", "Make the previous champion the champion again, without gates. A second rollback undoes the first.")
    options.add_argument("--reason", required=True, help="why, for the log")
    options.add_argument("--actor", help="who, for the log (default: the user of this process)")
    arguments = options.parse_args(argv)
    event = open_registry(arguments.home).rollback(arguments.name, actor=arguments.actor, reason=arguments.reason)
    Console().print(describe(event))
    return 0
