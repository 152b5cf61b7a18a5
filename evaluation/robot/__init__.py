"""A LIBERO robot as a ROS 2 node: cameras and state out, commands in, on its own clock."""

SUMMARY = "simulated_episodes"
"""Kind of the JSON that holds the episodes' outcomes."""
