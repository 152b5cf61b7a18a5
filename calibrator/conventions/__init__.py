"""Whether states are as the policy was trained on them: its own decisions against what was recorded."""
