"""Options that several commands share, and what they mean."""

import argparse
from pathlib import Path


def add_policy(parser: argparse._ActionsContainer, required: bool = True) -> None:
    parser.add_argument("--policy", type=Path, required=required, help="policy folder")


def add_calibration(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--calibration", type=Path, required=True, help="calibration set")


def add_unnorm_key(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--unnorm-key", help="statistics of actions and state, needed when the policy has several")


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="cpu", help="where the policy runs: cpu, cuda, cuda:1, ...")


def add_accept(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--accept-conventions", action="store_true", help="go on where another convention fits clearly better"
    )
