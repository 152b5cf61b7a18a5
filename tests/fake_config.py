"""A policy's configuration for actors that are no policy."""

from dataclasses import dataclass

from vla_policy.core.policy_config import PolicyConfig


@dataclass(frozen=True, kw_only=True)
class FakeConfig(PolicyConfig):
    """Of a policy that says itself how many of its rows are carried out before the next look."""

    carried_out: int

    @property
    def executed(self) -> int:
        return self.carried_out
