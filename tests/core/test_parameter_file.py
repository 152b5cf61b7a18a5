"""For which node a parameter file is written."""

import re
from pathlib import Path

import pytest

from vla_policy.core.errors import ContractError
from vla_policy.core.parameter_file import require_node

INNER = "{ros__parameters: {autostart: true}}"


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (f"/**: {INNER}", "/arm/policy_node"),
        (f"policy_node: {INNER}", "/policy_node"),
        (f"/arm/policy_node: {INNER}", "/arm/policy_node"),
        (f"arm: {{policy_node: {INNER}}}", "/arm/policy_node"),
        (f"/*/policy_node: {INNER}", "/arm/policy_node"),
        (f"/**/policy_node: {INNER}", "/left/arm/policy_node"),
        (f"other: {INNER}\n/**: {INNER}", "/policy_node"),
    ],
)
def test_a_file_for_the_node_is_taken(tmp_path: Path, text: str, node: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    require_node(tmp_path / "p.yaml", node)


@pytest.mark.parametrize(
    ("text", "node", "reason"),
    [
        (f"policy: {INNER}", "/policy_node", "has parameters for /policy, not for /policy_node; name it so, or /**"),
        (f"policy_node: {INNER}", "/arm/policy_node", "for /policy_node, not for /arm/policy_node"),
        (f"/*/policy_node: {INNER}", "/policy_node", "for /*/policy_node, not for /policy_node"),
        ("autostart: true", "/policy_node", "for no node, not for /policy_node"),
        ("a: [", "/policy_node", "not a readable parameter file"),
    ],
)
def test_a_file_for_others_only_is_refused(tmp_path: Path, text: str, node: str, reason: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ContractError, match=re.escape(reason)):
        require_node(tmp_path / "p.yaml", node)
