"""ROS 2 nodes: they wire `vla_policy.core` to topics, services, actions and parameters, and decide nothing."""
