"""The robot's side: a core without rclpy (``vla_policy.core``) and the nodes that wire it (``vla_policy.nodes``)."""
