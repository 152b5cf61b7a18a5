"""The small trained policies, their data, and the recipe that made them."""
