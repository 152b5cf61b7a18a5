"""What turns the policy's graphs into something that a target runs."""
