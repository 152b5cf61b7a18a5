"""From the table and a budget to a plan."""
